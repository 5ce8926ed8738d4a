"""An output in the words of /v1/responses: the events of a stream, and the same response whole."""

from __future__ import annotations

import json

import msgspec
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from atom_cluster.api.answers.outputs import OutputNews, TokenScore
from atom_cluster.api.openai.wire import WireFinishReason
from atom_cluster.api.responses.format import ResponsesFormat
from atom_cluster.api.responses.wire import STREAM_EVENTS, ResponseObject
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import RequestFailed
from atom_cluster.messages.requests import TokenLogprobs
from tests.api.scripted_parser import pieces_of
from tests.api.usages import usage_of

TEXT = "[think]hm[end]look:[call f]{}[call g]{1}"
USAGE = usage_of(prompt=7, completion=5, cached=3, reasoning=2)


def begun() -> ResponseObject:
    return ResponseObject(
        id="resp_x",
        created_at=1,
        status="in_progress",
        instructions=None,
        max_output_tokens=None,
        model="m",
        output=[],
        parallel_tool_calls=True,
        reasoning={},
        temperature=1.0,
        text={"format": {"type": "text"}},
        tool_choice="auto",
        tools=[],
        top_logprobs=0,
        top_p=1.0,
        usage=None,
        metadata={},
    )


def stream(text: str, *, size: int, tokenizer: Tokenizer, finish: WireFinishReason = "stop") -> list[dict]:
    """Events of a text whose pieces arrive `size` at a time."""
    words = ResponsesFormat(begun(), tokenizer, has_logprobs=False)
    pieces = pieces_of(text)
    structs = words.opening(0, USAGE)
    for start in range(0, len(pieces), size):
        structs += words.chunks(OutputNews(0, pieces[start : start + size]))
    structs += words.chunks(OutputNews(0, [], [], finish)) + words.closing(USAGE)
    for struct in structs:
        msgspec.convert(msgspec.to_builtins(struct), type(struct))
        assert isinstance(struct, STREAM_EVENTS)
    return [json.loads(msgspec.json.encode(struct)) for struct in structs]


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_stream_ends_with_the_response_that_a_whole_answer_is(
    tokenizer: Tokenizer, size: int, finish: WireFinishReason
) -> None:
    events = stream(TEXT, size=size, tokenizer=tokenizer, finish=finish)
    whole = ResponsesFormat(begun(), tokenizer, has_logprobs=False).whole(
        [OutputNews(0, pieces_of(TEXT), [], finish)], USAGE
    )
    assert events[-1]["response"] == json.loads(msgspec.json.encode(whole))
    assert events[-1]["type"] == ("response.completed" if finish == "stop" else "response.incomplete")
    assert [item["status"] for item in events[-1]["response"]["output"]][-1] == (
        "completed" if finish == "stop" else "incomplete"
    )
    assert events[-1]["response"]["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }


def test_events_are_numbered_and_are_openai_s(tokenizer: Tokenizer) -> None:
    events = stream(TEXT, size=1, tokenizer=tokenizer)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    adapter: TypeAdapter = TypeAdapter(ResponseStreamEvent)
    for event in events:
        if not event["type"].startswith(("response.c", "response.in")) or "part" in event["type"]:
            assert adapter.validate_python(event).type == event["type"]


def test_each_item_begins_grows_and_ends(tokenizer: Tokenizer) -> None:
    events = stream(TEXT, size=1, tokenizer=tokenizer)
    names = [event["type"].removeprefix("response.") for event in events[2:-1] if event["output_index"] == 1]
    assert names == [
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
    ]
    names = [event["type"].removeprefix("response.") for event in events[2:-1] if event["output_index"] == 3]
    assert names == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    kinds = [event["type"].removeprefix("response.") for event in events[2:-1] if event["output_index"] == 0]
    assert kinds[2:4] == ["reasoning_text.delta", "reasoning_text.done"]


def test_a_failure_keeps_what_was_done_and_hides_bugs(tokenizer: Tokenizer) -> None:
    for error, code in ((RequestFailed("lost"), "request_failed"), (KeyError("internals"), "internal_error")):
        words = ResponsesFormat(begun(), tokenizer, has_logprobs=False)
        words.opening(0, USAGE)
        words.chunks(OutputNews(0, pieces_of("[think]hm[end]lo")))
        event = json.loads(msgspec.json.encode(words.failure(error)))
        assert (event["type"], event["response"]["status"]) == ("response.failed", "failed")
        assert event["response"]["error"]["code"] == code
        assert [item["type"] for item in event["response"]["output"]] == ["reasoning"]
        assert "internals" not in json.dumps(event)


def test_a_part_that_has_begun_has_no_log_probabilities_yet(tokenizer: Tokenizer) -> None:
    """Whatever arrives with it: events are written after all of them were made."""
    *ids, end = tokenizer.encode("abc")
    scores = [TokenScore(token_id, TokenLogprobs(-0.5), 0) for token_id in ids]
    last = [TokenScore(end, TokenLogprobs(-0.5), 0)]
    words = ResponsesFormat(begun(), tokenizer, has_logprobs=True)
    structs = words.chunks(OutputNews(0, pieces_of("ab"), scores)) + words.chunks(OutputNews(0, [], last, "stop"))
    events = {event["type"].removeprefix("response."): event for event in map(as_json, structs)}
    assert events["content_part.added"]["part"]["logprobs"] == []
    assert [entry["token"] for entry in events["output_text.delta"]["logprobs"]] == ["a", "b"]
    assert [entry["token"] for entry in events["output_text.done"]["logprobs"]] == ["a", "b", "c"]
    assert events["content_part.done"]["part"]["logprobs"] == events["output_text.done"]["logprobs"]


def test_each_text_has_its_own_log_probabilities(tokenizer: Tokenizer) -> None:
    words = ResponsesFormat(begun(), tokenizer, has_logprobs=True)
    structs = []
    for text, token in (("a", "a"), ("[think]hm", "h"), ("b", "b")):
        scores = [TokenScore(token_id, TokenLogprobs(-0.5), 0) for token_id in tokenizer.encode(token)]
        structs += words.chunks(OutputNews(0, pieces_of(text), scores))
    structs += words.chunks(OutputNews(0, [], [], "stop"))
    texts = [event for event in map(as_json, structs) if event["type"].endswith("output_text.done")]
    found = [(event["text"], [entry["token"] for entry in event["logprobs"]]) for event in texts]
    assert found == [("a", ["a"]), ("b", ["h", "b"])]


def as_json(struct: msgspec.Struct) -> dict:
    return json.loads(msgspec.json.encode(struct))


def test_log_probabilities_come_with_the_text(tokenizer: Tokenizer) -> None:
    scores = [TokenScore(token_id, TokenLogprobs(-0.5), 0) for token_id in tokenizer.encode("ab")]
    news = [OutputNews(0, pieces_of("ab"), scores, "stop")]
    whole = ResponsesFormat(begun(), tokenizer, has_logprobs=True).whole(news, USAGE)
    part = json.loads(msgspec.json.encode(whole))["output"][0]["content"][0]
    assert [entry["token"] for entry in part["logprobs"]] == ["a", "b"]
    words = ResponsesFormat(begun(), tokenizer, has_logprobs=True)
    events = [json.loads(msgspec.json.encode(struct)) for struct in words.chunks(news[0])]
    assert [event["logprobs"] for event in events if event["type"].endswith("text.delta")] == [part["logprobs"]]
    assert [event["logprobs"] for event in events if event["type"].endswith("text.done")] == [part["logprobs"]]
