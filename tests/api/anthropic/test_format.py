"""An output in the words of /v1/messages: the events of a stream, and the same message whole."""

from __future__ import annotations

import json

import msgspec
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from atom_cluster.api.answers.outputs import OutputNews
from atom_cluster.api.anthropic.format import MessagesFormat
from atom_cluster.api.openai.wire import WireFinishReason
from atom_cluster.errors import NotReady, RequestTimeout
from tests.api.scripted_parser import pieces_of
from tests.api.usages import usage_of

TEXT = '[think]hm[end]look:[call f]{"a":1}[call g]{}'
USAGE = usage_of(prompt=7, completion=5, cached=3)


def words(*, sends_thinking: bool = True) -> MessagesFormat:
    return MessagesFormat(answer_id="msg_x", model="m", request_id="r", sends_thinking=sends_thinking)


def stream(text: str, *, size: int = 1, finish: WireFinishReason = "stop", sends_thinking: bool = True) -> list[dict]:
    """Events of a text whose pieces arrive `size` at a time; each is one of Anthropic's."""
    form = words(sends_thinking=sends_thinking)
    pieces = pieces_of(text)
    structs = form.opening(0, USAGE)
    for start in range(0, len(pieces), size):
        structs += form.chunks(OutputNews(0, pieces[start : start + size]))
    structs += form.chunks(OutputNews(0, [], [], finish)) + form.closing(USAGE)
    events = [json.loads(msgspec.json.encode(struct)) for struct in structs]
    adapter: TypeAdapter = TypeAdapter(RawMessageStreamEvent)
    for event in events:
        if event["type"] != "ping":
            assert adapter.validate_python(event).type == event["type"]
    return events


def whole(text: str, *, finish: WireFinishReason = "stop", matched_stop: str | None = None) -> dict:
    message = words().whole([OutputNews(0, pieces_of(text), [], finish, matched_stop)], USAGE)
    Message.model_validate(msgspec.to_builtins(message))
    return json.loads(msgspec.json.encode(message))


def joined(events: list[dict]) -> list[dict]:
    """The blocks that a stream's events add up to."""
    blocks: list[dict] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            for delta_key, block_key in (("text", "text"), ("thinking", "thinking"), ("partial_json", "json")):
                block[block_key] = (
                    block.get(block_key, "") + delta.get(delta_key, "")
                    if delta_key in delta
                    else (block.get(block_key, ""))
                )
    for block in blocks:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(text)
    return [{key: value for key, value in block.items() if value != "" or key == "signature"} for block in blocks]


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_stream_adds_up_to_the_whole_message(size: int) -> None:
    events = stream(TEXT, size=size, finish="tool_calls")
    message = whole(TEXT, finish="tool_calls")
    assert joined(events) == message["content"]
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert message["content"][2]["input"] == {"a": 1}
    end = events[-2]
    assert end["delta"] == {"stop_reason": message["stop_reason"], "stop_sequence": None}
    assert end["usage"] == message["usage"]


def test_events_come_in_anthropic_s_order() -> None:
    kinds = [event["type"] for event in stream("hi")]
    assert kinds == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_input_tokens_are_those_that_were_not_cached() -> None:
    assert whole("hi")["usage"] == {"input_tokens": 4, "cache_read_input_tokens": 3, "output_tokens": 5}


@pytest.mark.parametrize(
    ("finish", "matched_stop", "reason"),
    [
        ("stop", None, "end_turn"),
        ("length", None, "max_tokens"),
        ("tool_calls", None, "tool_use"),
        ("stop", "END", "stop_sequence"),
    ],
)
def test_why_it_ended(finish: WireFinishReason, matched_stop: str | None, reason: str) -> None:
    message = whole("hi[call f]{}" if reason == "tool_use" else "hi", finish=finish, matched_stop=matched_stop)
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, matched_stop)


def test_thinking_that_is_not_wanted_is_left_out_and_not_counted() -> None:
    events = stream("[think]hm[end]a[think]hm[end]b", sends_thinking=False)
    assert [block["text"] for block in joined(events)] == ["a", "b"]


def test_a_call_that_was_cut_off_is_text() -> None:
    (block,) = whole('[call f]{"a":', finish="length")["content"]
    assert block == {"type": "text", "text": '{"a":'}


def test_a_message_without_a_call_does_not_end_for_one() -> None:
    """The model ended its call and wrote no JSON."""
    message = whole("[call f]{city: Oslo}", finish="tool_calls")
    assert message["content"] == [{"type": "text", "text": "{city: Oslo}"}]
    assert message["stop_reason"] == "end_turn"
    both = whole("[call f]{city: Oslo}[call g]{}", finish="tool_calls")
    assert ([block["type"] for block in both["content"]], both["stop_reason"]) == (["text", "tool_use"], "tool_use")


@pytest.mark.parametrize(
    ("error", "kind"),
    [(NotReady("m"), "overloaded_error"), (RequestTimeout("m"), "timeout_error"), (KeyError("secret"), "api_error")],
)
def test_a_failure_is_an_error_event(error: Exception, kind: str) -> None:
    event = json.loads(msgspec.json.encode(words().failure(error)))
    assert (event["type"], event["error"]["type"], event["request_id"]) == ("error", kind, "r")
    assert "secret" not in event["error"]["message"]
