"""News of an output in the words of /v1/messages: blocks that begin, grow and end, within a message that does too."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from atom_cluster.api.answers.outputs import OutputNews
from atom_cluster.api.answers.segments import Change, Segment, Segmenter, segments_of
from atom_cluster.api.anthropic import wire
from atom_cluster.api.anthropic.errors import messages_error
from atom_cluster.api.http.error_responses import error_body, status_of
from atom_cluster.api.openai.wire import Usage


class MessagesFormat:
    """Words of one answer of /v1/messages, which has one output."""

    is_typed = True

    def __init__(self, *, answer_id: str, model: str, request_id: str, sends_thinking: bool) -> None:
        self._id = answer_id
        self._model = model
        self._request_id = request_id
        self._sends_thinking = sends_thinking
        self._segmenter = Segmenter()
        self._num_left_out = 0
        self._end = wire.StopDelta(stop_reason=None, stop_sequence=None)

    def opening(self, index: int, usage: Usage) -> list[Struct]:
        """The message without content, and a ping, as the original sends it."""
        return [wire.MessageStart(message=self._message([], self._end, usage)), wire.Ping()]

    def chunks(self, news: OutputNews) -> list[Struct]:
        """Events of the blocks that begin, grow or end."""
        changes = [*self._segmenter.feed(news.pieces)]
        if news.finish_reason is not None:
            changes += self._segmenter.finish()
            self._end = _end_of(news)
        return [event for change in changes if (event := self._event(change)) is not None]

    def closing(self, usage: Usage) -> list[Struct]:
        """How the message ends, and that it does."""
        return [wire.MessageEnd(delta=self._end, usage=_usage(usage)), wire.MessageStop()]

    def failure(self, error: BaseException) -> Struct:
        """The error in Anthropic's form."""
        return messages_error(error_body(error).error, status=status_of(error), request_id=self._request_id)

    def whole(self, news: Sequence[OutputNews], usage: Usage) -> Struct:
        """See `AnswerFormat`."""
        (entry,) = news
        blocks = [_whole_block(segment) for segment in segments_of(entry.pieces) if not self._is_left_out(segment)]
        end = _end_of(entry)
        if end.stop_reason == "tool_use" and not any(isinstance(block, wire.AnswerToolUseBlock) for block in blocks):
            end = wire.StopDelta(stop_reason="end_turn", stop_sequence=None)
        return self._message(blocks, end, usage)

    def _event(self, change: Change) -> Struct | None:
        if self._is_left_out(change.segment):
            self._num_left_out += change.kind == "begin"
            return None
        index = change.segment.index - self._num_left_out
        if change.kind == "begin":
            return wire.BlockStart(index=index, content_block=_empty_block(change.segment))
        if change.kind == "end":
            return wire.BlockStop(index=index)
        return wire.BlockDelta(index=index, delta=_delta(change))

    def _is_left_out(self, segment: Segment) -> bool:
        return segment.kind == "reasoning" and not self._sends_thinking

    def _message(self, blocks: list[wire.Block], end: wire.StopDelta, usage: Usage) -> wire.MessageObject:
        return wire.MessageObject(
            id=self._id,
            model=self._model,
            content=blocks,
            stop_reason=end.stop_reason,
            stop_sequence=end.stop_sequence,
            usage=_usage(usage),
        )


def _end_of(news: OutputNews) -> wire.StopDelta:
    if news.matched_stop is not None:
        return wire.StopDelta(stop_reason="stop_sequence", stop_sequence=news.matched_stop)
    reasons: dict[str | None, wire.StopReason] = {"length": "max_tokens", "tool_calls": "tool_use"}
    return wire.StopDelta(stop_reason=reasons.get(news.finish_reason, "end_turn"), stop_sequence=None)


def _usage(usage: Usage) -> wire.MessageUsage:
    num_cached = usage.prompt_tokens_details.cached_tokens
    return wire.MessageUsage(
        input_tokens=usage.prompt_tokens - num_cached,
        cache_read_input_tokens=num_cached,
        output_tokens=usage.completion_tokens,
    )


def _empty_block(segment: Segment) -> wire.Block:
    if segment.call is not None:
        return wire.AnswerToolUseBlock(id=segment.call.call_id, name=segment.call.name, input={})
    return wire.AnswerThinkingBlock(thinking="") if segment.kind == "reasoning" else wire.AnswerTextBlock(text="")


def _whole_block(segment: Segment) -> wire.Block:
    """A call whose arguments are no JSON object, as when they were cut off, is text: nobody should run it."""
    if segment.kind == "reasoning":
        return wire.AnswerThinkingBlock(thinking=segment.text)
    if segment.call is None:
        return wire.AnswerTextBlock(text=segment.text)
    try:
        value = msgspec.json.decode(segment.text, type=dict[str, object])
    except (msgspec.DecodeError, RecursionError):
        return wire.AnswerTextBlock(text=segment.text)
    return wire.AnswerToolUseBlock(id=segment.call.call_id, name=segment.call.name, input=value)


def _delta(change: Change) -> wire.TextBlockDelta | wire.ThinkingBlockDelta | wire.InputBlockDelta:
    if change.segment.kind == "call":
        return wire.InputBlockDelta(partial_json=change.text)
    if change.segment.kind == "reasoning":
        return wire.ThinkingBlockDelta(thinking=change.text)
    return wire.TextBlockDelta(text=change.text)
