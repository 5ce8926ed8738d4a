"""News of an output in the words of /v1/responses: items that begin, grow and end, within a response that does too."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from atom_cluster.api.answers.outputs import OutputNews
from atom_cluster.api.answers.segments import Change, Segment, Segmenter, segments_of
from atom_cluster.api.http.error_responses import error_body
from atom_cluster.api.openai.format import token_logprobs
from atom_cluster.api.openai.wire import ChatTokenLogprob, Usage, WireFinishReason
from atom_cluster.api.responses import wire
from atom_cluster.api.text.tokenizer import Tokenizer


class ResponsesFormat:
    """Words of one answer of /v1/responses, which has one output. Events are numbered in the order they are made."""

    is_typed = True

    def __init__(self, response: wire.ResponseObject, tokenizer: Tokenizer, *, has_logprobs: bool) -> None:
        """`response`: as it is before there is any output."""
        self._response = response
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._segmenter = Segmenter()
        self._done: list[wire.OutputItem] = []
        self._logprobs: list[ChatTokenLogprob] = []
        """Of the current message."""
        self._waiting: list[ChatTokenLogprob] = []
        """Of tokens that no text has come with yet."""
        self._num_events = 0
        self._finish: WireFinishReason = "stop"

    def opening(self, index: int, usage: Usage) -> list[Struct]:
        """The response is there, and under way."""
        return [self._response_event("response.created"), self._response_event("response.in_progress")]

    def chunks(self, news: OutputNews) -> list[Struct]:
        """Events of the items that begin, grow or end."""
        self._waiting += self._scores(news)
        events: list[Struct] = []
        for change in self._segmenter.feed(news.pieces):
            events += self._events(change, "completed")
        if news.finish_reason is not None:
            self._finish = news.finish_reason
            for change in self._segmenter.finish():
                if change.segment.kind == "text":
                    self._take_waiting()
                events += self._events(change, _status_of_last(news.finish_reason))
        return events

    def closing(self, usage: Usage) -> list[Struct]:
        """The whole response."""
        response = self._ended(self._done, self._finish, usage)
        is_cut = response.status == "incomplete"
        return [self._response_event("response.incomplete" if is_cut else "response.completed", response)]

    def failure(self, error: BaseException) -> Struct:
        """The response with what is done of it, and the error."""
        detail = error_body(error).error
        failed = msgspec.structs.replace(
            self._response,
            status="failed",
            output=self._done,
            error=wire.ResponseError(code=detail.code or "server_error", message=detail.message),
        )
        return self._response_event("response.failed", failed)

    def whole(self, news: Sequence[OutputNews], usage: Usage) -> Struct:
        """See `AnswerFormat`."""
        (entry,) = news
        finish = entry.finish_reason or "stop"
        segments = segments_of(entry.pieces)
        self._waiting = self._scores(entry)
        items = []
        for segment in segments:
            if segment.kind == "text":
                self._take_waiting()
            is_last = segment is segments[-1]
            items.append(self._item(segment, segment.text, _status_of_last(finish) if is_last else "completed"))
            self._logprobs = []
        return self._ended(items, finish, usage)

    def _ended(self, items: list[wire.OutputItem], finish: WireFinishReason, usage: Usage) -> wire.ResponseObject:
        is_cut = finish == "length"
        cached_tokens = usage.prompt_tokens_details.cached_tokens
        reasoning_tokens = usage.completion_tokens_details.reasoning_tokens
        return msgspec.structs.replace(
            self._response,
            status="incomplete" if is_cut else "completed",
            incomplete_details=wire.IncompleteDetails(reason="max_output_tokens") if is_cut else None,
            output=items,
            usage=wire.ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=wire.InputTokensDetails(cached_tokens=cached_tokens),
                output_tokens=usage.completion_tokens,
                output_tokens_details=wire.OutputTokensDetails(reasoning_tokens=reasoning_tokens),
                total_tokens=usage.total_tokens,
            ),
        )

    def _events(self, change: Change, status_at_end: wire.ItemStatus) -> list[Struct]:
        segment = change.segment
        if change.kind == "begin":
            item = self._item(segment, "", "in_progress")
            events = [self._item_event("response.output_item.added", segment, item)]
            return events + self._part_events("response.content_part.added", segment, "")
        if change.kind == "grow":
            return [self._delta(segment, change.text)]
        events = [self._all_of(segment), *self._part_events("response.content_part.done", segment, segment.text)]
        item = self._item(segment, segment.text, status_at_end)
        self._done.append(item)
        self._logprobs = []
        return [*events, self._item_event("response.output_item.done", segment, item)]

    def _delta(self, segment: Segment, text: str) -> Struct:
        number, item_id, index = self._next_number(), self._item_id(segment), segment.index
        if segment.kind == "call":
            return wire.ArgumentsDeltaEvent(sequence_number=number, item_id=item_id, output_index=index, delta=text)
        if segment.kind == "reasoning":
            return wire.ReasoningDeltaEvent(sequence_number=number, item_id=item_id, output_index=index, delta=text)
        return wire.TextDeltaEvent(
            sequence_number=number, item_id=item_id, output_index=index, delta=text, logprobs=self._take_waiting()
        )

    def _take_waiting(self) -> list[ChatTokenLogprob]:
        """Log probabilities that are told with text of the current message for the first time."""
        taken, self._waiting = self._waiting, []
        self._logprobs += taken
        return taken

    def _all_of(self, segment: Segment) -> Struct:
        number, item_id, index, text = self._next_number(), self._item_id(segment), segment.index, segment.text
        if segment.call is not None:
            name = segment.call.name
            return wire.ArgumentsDoneEvent(
                sequence_number=number, item_id=item_id, output_index=index, name=name, arguments=text
            )
        if segment.kind == "reasoning":
            return wire.ReasoningDoneEvent(sequence_number=number, item_id=item_id, output_index=index, text=text)
        return wire.TextDoneEvent(
            sequence_number=number, item_id=item_id, output_index=index, text=text, logprobs=self._logprobs
        )

    def _part_events(self, kind: wire.PartEventKind, segment: Segment, text: str) -> list[Struct]:
        """Calls have no parts."""
        if segment.kind == "call":
            return []
        is_text = segment.kind == "text"
        event = wire.ContentPartEvent(
            type=kind,
            sequence_number=self._next_number(),
            item_id=self._item_id(segment),
            output_index=segment.index,
            part=self._text_part(text) if is_text else wire.ReasoningTextPart(text=text),
        )
        return [event]

    def _item_event(self, kind: wire.ItemEventKind, segment: Segment, item: wire.OutputItem) -> Struct:
        return wire.OutputItemEvent(
            type=kind, sequence_number=self._next_number(), output_index=segment.index, item=item
        )

    def _response_event(self, kind: wire.ResponseEventKind, response: wire.ResponseObject | None = None) -> Struct:
        return wire.ResponseEvent(type=kind, sequence_number=self._next_number(), response=response or self._response)

    def _item(self, segment: Segment, text: str, status: wire.ItemStatus) -> wire.OutputItem:
        """An item with this much of its text; one that has only begun has no parts yet."""
        item_id, has_parts = self._item_id(segment), status != "in_progress"
        if segment.call is not None:
            call = segment.call
            return wire.FunctionCallOutput(
                id=item_id, status=status, call_id=call.call_id, name=call.name, arguments=text
            )
        if segment.kind == "reasoning":
            content = [wire.ReasoningTextPart(text=text)] if has_parts else []
            return wire.ReasoningOutput(id=item_id, status=status, content=content)
        return wire.MessageOutput(id=item_id, status=status, content=[self._text_part(text)] if has_parts else [])

    def _text_part(self, text: str) -> wire.OutputText:
        # A copy: the event is written later, when the list may have grown.
        return wire.OutputText(text=text, logprobs=[*self._logprobs])

    def _item_id(self, segment: Segment) -> str:
        prefix = {"text": "msg", "reasoning": "rs", "call": "fc"}[segment.kind]
        return f"{prefix}_{self._response.id.removeprefix('resp_')}_{segment.index}"

    def _scores(self, news: OutputNews) -> list[ChatTokenLogprob]:
        if not self._has_logprobs:
            return []
        return [token_logprobs(score, self._tokenizer) for score in news.scores]

    def _next_number(self) -> int:
        self._num_events += 1
        return self._num_events - 1


def _status_of_last(finish: WireFinishReason) -> wire.ItemStatus:
    return "incomplete" if finish == "length" else "completed"
