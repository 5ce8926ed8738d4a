"""Server-sent events: what a streaming client reads."""

from __future__ import annotations

import asyncio
import json

import pytest

from atom_cluster.api.answers.outputs import ClientLeftError, Output, RunningOutputs
from atom_cluster.api.answers.sse import DONE, event_stream
from atom_cluster.api.generator import GenerateInput
from atom_cluster.api.openai.format import AnswerHeader, ChatFormat
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import Overloaded
from atom_cluster.messages.requests import SamplingParams
from tests.api.fake_generator import FakeGenerator, Script
from tests.api.usages import usage_of


async def pieces_of(tokenizer: Tokenizer, script: Script, *, num_outputs: int = 1) -> list[bytes]:
    """What is written for each wake-up, collected until the stream ends or raises."""
    outputs = [
        Output(
            index,
            GenerateInput(request_id=str(index), token_ids=(1,), sampling=SamplingParams()),
            tokenizer,
            stop=(),
            eos=frozenset(),
        )
        for index in range(num_outputs)
    ]
    words = ChatFormat(AnswerHeader(id="i", created=0, model="m", usage_in_stream=False, has_logprobs=False), tokenizer)
    pieces: list[bytes] = []
    async with RunningOutputs(FakeGenerator(script), outputs) as running:
        async for piece in event_stream(running, words, usage=usage_of):
            pieces.append(piece)
            # Let everything that can arrive do so before the next piece is asked for.
            for _ in range(50):
                await asyncio.sleep(0)
    return pieces


def payloads(piece: bytes) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in piece.decode().split("\n\n") if line.endswith("}")]


async def test_tokens_that_arrived_together_leave_as_one_event(tokenizer: Tokenizer) -> None:
    letters = [(token_id,) for token_id in tokenizer.encode("abcdef")]
    first, rest = await pieces_of(tokenizer, lambda request: [*letters, "stop"])
    assert [entry["choices"][0]["delta"] for entry in payloads(first)] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
    ]
    assert [entry["choices"][0]["delta"] for entry in payloads(rest)] == [{"content": "bcdef"}, {}]
    assert rest.endswith(DONE)


async def test_each_output_is_opened_once(tokenizer: Tokenizer) -> None:
    letters = [(token_id,) for token_id in tokenizer.encode("ab")]
    pieces = await pieces_of(tokenizer, lambda request: [*letters, "stop"], num_outputs=3)
    entries = [entry for piece in pieces for entry in payloads(piece)]
    opened = [entry["choices"][0]["index"] for entry in entries if "role" in entry["choices"][0]["delta"]]
    assert sorted(opened) == [0, 1, 2]


async def test_line_ends_in_text_do_not_end_an_event(tokenizer: Tokenizer) -> None:
    ids = tuple(tokenizer.encode("a\n\ndata: [DONE]\r\n\n"))
    pieces = await pieces_of(tokenizer, lambda request: [ids, "stop"])
    assert b"".join(pieces).count(DONE) == 1
    assert payloads(pieces[0])[1]["choices"][0]["delta"]["content"] == "a\n\ndata: [DONE]\r\n\n"


async def test_an_error_before_anything_was_written_is_raised(tokenizer: Tokenizer) -> None:
    with pytest.raises(Overloaded):
        await pieces_of(tokenizer, lambda request: [Overloaded("full")])


async def test_a_client_that_leaves_is_neither_told_nor_logged(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    output = Output(
        0, GenerateInput(request_id="r", token_ids=(1,), sampling=SamplingParams()), tokenizer, stop=(), eos=frozenset()
    )
    header = AnswerHeader(id="i", created=0, model="m", usage_in_stream=False, has_logprobs=False)
    generator = FakeGenerator(lambda request: [tuple(tokenizer.encode("a")), asyncio.Event()])
    pieces: list[bytes] = []
    async with RunningOutputs(generator, [output]) as running:
        with pytest.raises(ClientLeftError):
            async for piece in event_stream(running, ChatFormat(header, tokenizer), usage=usage_of):
                pieces.append(piece)
                running.fail(ClientLeftError())
    assert len(pieces) == 1 and b"error" not in pieces[0]
    assert caplog.text == ""


async def test_a_bug_in_the_middle_is_told_to_the_client_and_raised(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[bytes] = []
    gate = asyncio.Event()
    output = Output(
        0,
        GenerateInput(request_id="r", token_ids=(1,), sampling=SamplingParams()),
        tokenizer,
        stop=(),
        eos=frozenset(),
    )
    header = AnswerHeader(id="i", created=0, model="m", usage_in_stream=False, has_logprobs=False)
    generator = FakeGenerator(lambda request: [tuple(tokenizer.encode("a")), gate, KeyError("internals")])
    async with RunningOutputs(generator, [output]) as running:
        with pytest.raises(KeyError):
            async for piece in event_stream(running, ChatFormat(header, tokenizer), usage=usage_of):
                seen.append(piece)
                gate.set()
    assert payloads(seen[-1])[0]["error"]["code"] == "internal_error"
    assert b"internals" not in seen[-1] and DONE not in seen[-1]
    assert "a stream failed" in caplog.text
