"""Where the time of one request went, from its arrival at the ingress to the last byte of its answer.

While a request runs, the ingress notes what it sees of it on its own clock (`RequestRecord` and what is in it). Engines
tell how long each of their stretches took, and nothing else (`messages.timing`). When the request has ended, `compose`
puts the two together: of the time between sending a request to an engine and hearing of its end, what the engine does
not account for is the way there and back. So the spans of an output follow each other without gap or overlap, from
arrival to end, and what nobody can account for is a span called `unattributed` and not hidden in another one.

How much of a way was there and how much was back, no clock can tell. Half is assumed to be, less if the first token
would else have arrived before it was there. Knows nothing of HTTP, of sockets or of who reads timelines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from msgspec import Struct

from atom_cluster.messages.timing import RequestTiming

MAX_OUTPUTS = 16
"""Of one request, whose spans are told; of the others only the number."""
MAX_ATTEMPTS = 8
"""Of one output. Of those in between, that there were any can be seen from `unattributed`."""

UNATTRIBUTED = "unattributed"
_SECONDS_DIGITS = 7
_NO_TIME_S = 1e-9
"""Less than this is rounding."""


class TimelineSpan(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One stretch of an output's time."""

    name: str
    """Of an engine's time as in `messages.timing.SpanName`. Of the ingress's:

    - read: until the body was there
    - check: it was parsed and checked against its schema
    - prepare: the chat template was rendered, the prompt tokenized, a grammar compiled if there is one
    - wait_for_engine: no engine could take it
    - route: the prompt's blocks were hashed, and the router was asked
    - wire: it was on its way to the engine, or the last tokens were on their way back
    - answer: from the last token to the last byte written
    - unattributed: nobody said what it was
    """
    replica: str = ""
    """Whose time it was. Empty between two processes."""
    start_s: float
    """From the request's arrival."""
    duration_s: float
    """Until the next one begins."""
    attempt: int = 0
    """Which of the output's attempts it belongs to, from 1 on; 0 for none."""
    num_steps: int = 0
    """Steps of the engine that the request took part in."""


class TimelineAttempt(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine's work on an output. An output has several when engines are lost or stopped."""

    engine: str
    """The replica that answered."""
    prefill: str = ""
    """The replica that was to compute the prompt for it. Whether it did, the spans tell."""
    reason: str = ""
    """Why these: as in the router's metric of decisions."""
    num_tokens: int = 0
    """Output tokens that came from it."""
    error: str = ""
    """Why it did not finish, if it did not."""
    kv_read_s: float = 0.0
    """Seconds of reading blocks from prefill. What of it the request waited for is its span `kv_transfer`."""
    kv_read_bytes: int = 0
    """Bytes of those blocks."""


class TimelineOutput(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One output of a request."""

    index: int
    """Outputs of the first prompt come first."""
    num_tokens: int
    """Output tokens that reached the ingress."""
    ttft_s: float | None = None
    """From the request's arrival to the first token at the ingress; None if there was none."""
    attempts: tuple[TimelineAttempt, ...]
    """Engines that worked on it, in order."""
    spans: tuple[TimelineSpan, ...]
    """From the request's arrival to its end: their durations add up to its `latency_s`."""


class Timeline(Struct, frozen=True, kw_only=True):
    """What /v1/requests/{id}/timeline answers."""

    id: str
    """Of the answer."""
    object: Literal["request.timeline"] = "request.timeline"
    request_id: str
    """The client's, or what the answer's header named."""
    ingress: str
    """Who answered it."""
    route: str
    """The template of its path."""
    status: int
    """Of the HTTP answer."""
    error: str | None
    """Why it ended without its answer, if it did."""
    created: float
    """When it arrived, in Unix seconds of the ingress's clock."""
    latency_s: float
    """From its arrival to the last byte of its answer."""
    num_prompt_tokens: int
    """Each prompt once."""
    num_outputs: int
    """How many there were."""
    outputs: tuple[TimelineOutput, ...]
    """The first 16."""


@dataclass(slots=True)
class AttemptRecord:
    """What the ingress sees of one attempt. Times are of its monotonic clock."""

    began_s: float
    notes: list[tuple[str, float]] = field(default_factory=list)
    """What it did before it had sent the request, each with when that ended."""
    engine: str = ""
    prefill: str = ""
    reason: str = ""
    sent_s: float | None = None
    first_at_s: float | None = None
    """When the first token came."""
    last_at_s: float | None = None
    """When the last word of the engine came."""
    num_tokens: int = 0
    timing: RequestTiming | None = None
    """The latest that the engine told."""
    timed_at_s: float = 0.0
    """When that came."""
    to_first_s: float | None = None
    """From arrival at the engine to the first token, as it told."""
    ended_s: float | None = None
    error: str = ""

    def note(self, name: str, now_s: float) -> None:
        """What was done since the last note. The same again goes on with it."""
        if self.notes and self.notes[-1][0] == name:
            self.notes.pop()
        self.notes.append((name, now_s))

    def hear(self, num_tokens: int, timing: RequestTiming | None, now_s: float) -> None:
        """The engine said something."""
        if num_tokens and self.first_at_s is None:
            self.first_at_s = now_s
            self.to_first_s = None if timing is None else timing.total_s
        self.num_tokens += num_tokens
        self.last_at_s = now_s
        if timing is not None:
            self.timing, self.timed_at_s = timing, now_s


@dataclass(slots=True)
class OutputRecord:
    """What the ingress sees of one output."""

    clock: Callable[[], float] = time.monotonic
    client_request_id: str = ""
    attempts: list[AttemptRecord] = field(default_factory=list)

    def begin_attempt(self) -> AttemptRecord:
        """An engine is to be found for it."""
        attempt = AttemptRecord(self.clock())
        if len(self.attempts) == MAX_ATTEMPTS:
            self.attempts.pop()
        self.attempts.append(attempt)
        return attempt

    @property
    def num_tokens(self) -> int:
        """Output tokens that arrived, of the attempts that are told."""
        return sum(attempt.num_tokens for attempt in self.attempts)

    @property
    def first_at_s(self) -> float | None:
        """When the first token came."""
        return next((attempt.first_at_s for attempt in self.attempts if attempt.first_at_s is not None), None)


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What the ingress sees of one HTTP request. Times are of its monotonic clock."""

    arrived_s: float
    created: float
    """Unix seconds, for people."""
    method: str = ""
    route: str = ""
    """The template, not the path."""
    traceparent: str = ""
    """As the client sent it."""
    request_id: str = ""
    key_name: str = ""
    """Of the API key; never the key."""
    read_s: float | None = None
    """When the body was there."""
    checked_s: float | None = None
    """When it had been checked."""
    ended_s: float = 0.0
    status: int = 0
    error: str = ""
    answer_id: str = ""
    num_prompt_tokens: int = 0
    outputs: list[OutputRecord] = field(default_factory=list)
    finish_reasons: tuple[str, ...] = ()

    @property
    def latency_s(self) -> float:
        """From arrival to end."""
        return self.ended_s - self.arrived_s

    @property
    def num_output_tokens(self) -> int:
        """Of all outputs."""
        return sum(output.num_tokens for output in self.outputs)

    @property
    def ttft_s(self) -> float | None:
        """To the first token of any output."""
        first = min((output.first_at_s for output in self.outputs if output.first_at_s is not None), default=None)
        return None if first is None else first - self.arrived_s


def compose(record: RequestRecord, *, ingress: str) -> Timeline:
    """The timeline of a request that has ended."""
    return Timeline(
        id=record.answer_id,
        request_id=record.request_id,
        ingress=ingress,
        route=record.route,
        status=record.status,
        error=record.error or None,
        created=record.created,
        latency_s=round(record.latency_s, _SECONDS_DIGITS),
        num_prompt_tokens=record.num_prompt_tokens,
        num_outputs=len(record.outputs),
        outputs=tuple(
            _output(index, output, record, ingress) for index, output in enumerate(record.outputs[:MAX_OUTPUTS])
        ),
    )


def _output(index: int, output: OutputRecord, record: RequestRecord, ingress: str) -> TimelineOutput:
    row = _Row(record.arrived_s)
    row.go_on("read", record.read_s, ingress)
    row.go_on("check", record.checked_s, ingress)
    if output.attempts:
        row.go_on("prepare", output.attempts[0].began_s, ingress)
    for number, attempt in enumerate(output.attempts, 1):
        row.attempt = 0
        row.go_on(UNATTRIBUTED, attempt.began_s, ingress)
        row.attempt = number
        for name, until_s in attempt.notes:
            row.go_on(name, until_s, ingress)
        if attempt.sent_s is not None:
            _add_engine(row, attempt)
    row.attempt = 0
    row.go_on("answer", record.ended_s, ingress)
    first_at_s = output.first_at_s
    return TimelineOutput(
        index=index,
        num_tokens=output.num_tokens,
        ttft_s=None if first_at_s is None else round(first_at_s - record.arrived_s, _SECONDS_DIGITS),
        attempts=tuple(map(_attempt, output.attempts)),
        spans=tuple(row.spans),
    )


def _attempt(attempt: AttemptRecord) -> TimelineAttempt:
    timing = attempt.timing or RequestTiming()
    return TimelineAttempt(
        engine=attempt.engine,
        prefill=attempt.prefill,
        reason=attempt.reason,
        num_tokens=attempt.num_tokens,
        error=attempt.error,
        kv_read_s=round(timing.kv_read_s, _SECONDS_DIGITS),
        kv_read_bytes=timing.kv_read_bytes,
    )


def _add_engine(row: _Row, attempt: AttemptRecord) -> None:
    """Spans from sending the request to the engine's last word, or to the end of waiting for one."""
    if attempt.timing is not None:
        row.go_on("wire", row.now_s + _way_there_s(attempt, row.now_s))
        for span in attempt.timing.spans:
            replica = attempt.prefill if span.is_on_prefill else attempt.engine
            row.go_on(
                span.name, row.now_s + span.seconds, "" if span.name == "wire" else replica, num_steps=span.num_steps
            )
        row.go_on("wire", attempt.timed_at_s)
        # The engine was not heard to the end: it is gone, or was told to stop. Its tokens were.
        row.go_on("decode", attempt.last_at_s, attempt.engine)
    if attempt.error or attempt.timing is None:
        row.go_on(UNATTRIBUTED, attempt.ended_s, attempt.engine)


def _way_there_s(attempt: AttemptRecord, sent_s: float) -> float:
    timing = attempt.timing or RequestTiming()
    there_s = (attempt.timed_at_s - sent_s - timing.total_s) / 2
    if attempt.first_at_s is not None and attempt.to_first_s is not None:
        there_s = min(there_s, attempt.first_at_s - sent_s - attempt.to_first_s)
    return max(0.0, there_s)


class _Row:
    """Spans, one behind the other."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self.now_s = start_s
        self.attempt = 0
        self.spans: list[TimelineSpan] = []

    def go_on(self, name: str, until_s: float | None, replica: str = "", *, num_steps: int = 0) -> None:
        """A span from where the row has got to; nothing if that is there already.

        An engine that claims more time than there was has a clock that runs at another speed. The surplus is taken
        back by an unattributed span of negative length, so that it is seen and the sum stays right.
        """
        if until_s is None or abs(until_s - self.now_s) < _NO_TIME_S:
            return
        self.spans.append(
            TimelineSpan(
                name=name if until_s > self.now_s else UNATTRIBUTED,
                replica=replica,
                start_s=round(self.now_s - self._start_s, _SECONDS_DIGITS),
                duration_s=round(until_s - self.now_s, _SECONDS_DIGITS),
                attempt=self.attempt,
                num_steps=num_steps,
            )
        )
        self.now_s = until_s
