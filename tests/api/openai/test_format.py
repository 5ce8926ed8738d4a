"""Outputs in OpenAI's words."""

from __future__ import annotations

import math

import msgspec

from atom_cluster.api.answers.outputs import OutputNews, TokenScore
from atom_cluster.api.answers.pieces import (
    Piece,
    ReasoningPiece,
    TextPiece,
    ToolCallArguments,
    ToolCallBegun,
)
from atom_cluster.api.openai.format import AnswerHeader, ChatFormat, CompletionFormat
from atom_cluster.api.openai.token_texts import likely_texts
from atom_cluster.api.openai.wire import CompletionTokensDetails, PromptTokensDetails, Usage
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.messages.requests import TokenLogprobs, TopLogprob


def header(*, has_logprobs: bool = False, usage_in_stream: bool = False) -> AnswerHeader:
    return AnswerHeader(id="i", created=1, model="m", usage_in_stream=usage_in_stream, has_logprobs=has_logprobs)


def as_json(struct: msgspec.Struct) -> dict:
    return msgspec.json.decode(msgspec.json.encode(struct))


def test_chat_finish_reason_follows_the_text_in_a_chunk_of_its_own(tokenizer: Tokenizer) -> None:
    words = ChatFormat(header(), tokenizer)
    structs = words.opening(2, usage_of_nothing()) + words.chunks(OutputNews(2, [TextPiece("hi")], [], "stop"))
    chunks = [as_json(struct) for struct in structs]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "hi"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {2}
    assert all("usage" not in chunk for chunk in chunks)


def test_chunks_say_null_usage_only_when_usage_was_asked_for(tokenizer: Tokenizer) -> None:
    words = CompletionFormat(header(usage_in_stream=True), tokenizer)
    assert as_json(words.chunks(OutputNews(0, [TextPiece("a")]))[0])["usage"] is None


def test_a_token_that_is_part_of_a_character_is_told_apart_by_its_bytes(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("€")
    score = TokenScore(first, TokenLogprobs(-0.5, (TopLogprob(first, -0.5), TopLogprob(0, -math.inf))), 0)
    choice = as_json(
        ChatFormat(header(has_logprobs=True), tokenizer).chunks(OutputNews(0, [TextPiece("€")], [score]))[0]
    )
    token = choice["choices"][0]["logprobs"]["content"][0]
    assert (token["token"], token["bytes"]) == ("bytes:\\xe2", [0xE2])
    assert token["top_logprobs"][1]["logprob"] == -9999.0


def test_the_sampled_token_is_among_the_alternatives_of_a_completion(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab")
    score = TokenScore(a, TokenLogprobs(-3.0, (TopLogprob(b, -0.1),)), 7)
    words = CompletionFormat(header(has_logprobs=True), tokenizer)
    logprobs = as_json(words.chunks(OutputNews(0, [TextPiece("a")], [score]))[0])["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a"],
        "token_logprobs": [-3.0],
        "top_logprobs": [{"b": -0.1, "a": -3.0}],
        "text_offset": [7],
    }


def test_tokens_of_one_text_are_told_as_the_likeliest_or_the_one_that_is_there(tokenizer: Tokenizer) -> None:
    """Two ids without a token: models' vocabularies are padded."""
    (a,) = tokenizer.encode("a")
    top = (TopLogprob(50_000, -0.5), TopLogprob(a, -1.0), TopLogprob(50_001, -2.0))
    assert likely_texts(a, -1.0, top, tokenizer) == {"": -0.5, "a": -1.0}
    assert likely_texts(50_001, -2.0, top, tokenizer) == {"": -2.0, "a": -1.0}


PIECES: list[Piece] = [
    ReasoningPiece("hm"),
    TextPiece("look: "),
    ToolCallBegun(0, "call-a", "f"),
    ToolCallArguments(0, '{"x": 1}'),
    ToolCallBegun(1, "call-b", "g"),
    ToolCallArguments(1, "{}"),
]


def test_each_piece_is_a_delta(tokenizer: Tokenizer) -> None:
    chunks = [as_json(chunk) for chunk in ChatFormat(header(), tokenizer).chunks(OutputNews(0, PIECES))]
    call = {"index": 0, "id": "call-a", "type": "function", "function": {"name": "f", "arguments": ""}}
    assert [chunk["choices"][0]["delta"] for chunk in chunks][:4] == [
        {"reasoning_content": "hm"},
        {"content": "look: "},
        {"tool_calls": [call]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x": 1}'}}]},
    ]


def test_a_whole_answer_has_the_same_pieces(tokenizer: Tokenizer) -> None:
    words = ChatFormat(header(), tokenizer)
    usage = usage_of_nothing()
    message = as_json(words.whole([OutputNews(0, PIECES, [], "tool_calls")], usage))["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": "look: ",
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "call-a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "call-b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }
    only_calls = as_json(words.whole([OutputNews(0, PIECES[2:], [], "tool_calls")], usage))
    assert only_calls["choices"][0]["message"]["content"] is None


def test_reasoning_that_is_not_wanted_is_left_out(tokenizer: Tokenizer) -> None:
    words = ChatFormat(header(), tokenizer, sends_reasoning=False)
    assert words.chunks(OutputNews(0, PIECES[:1])) == []
    message = as_json(words.whole([OutputNews(0, PIECES[:2], [], "stop")], usage_of_nothing()))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "look: "}


def usage_of_nothing() -> Usage:
    return Usage(
        prompt_tokens=0,
        completion_tokens=0,
        total_tokens=0,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=0),
        ttft_s=0,
        tpot_s=0,
        latency_s=0,
    )
