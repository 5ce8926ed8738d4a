"""Where a request's time went, as durations: what an engine measures of a request and tells whoever asked for it.

Clocks of two hosts cannot be compared, so no time of day and no clock's reading leaves a process. An engine tells how
long each stretch between two events took, from a request's arrival to its end; stretches follow each other without a
gap, and so add up to the time that the request was there. Whoever waited for the engine knows how long that was, and
what is left is the way there and back (`observability.timeline`).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

SpanName = Literal[
    "queue",
    "prefill",
    "publish",
    "remote_prefill",
    "wire",
    "step_wait",
    "kv_transfer",
    "first_decode",
    "decode",
    "more",
]
"""What happened in a stretch of time on an engine:

- queue: it waited: for its turn, a row, or blocks; once more after each preemption and before it joins decode's batch
- prefill: its prompt was computed; after a preemption, the prompt with what was generated since
- publish: its last blocks got their checksums, and were announced to decode
- remote_prefill: a prefill engine was asked, and did not get as far as the first token
- wire: messages between two engines were on their way
- step_wait: the first token was there and was not looked at, for a millisecond while a step runs, or for as long as
  the engine does something else
- kv_transfer: the client had the first token, and blocks were still being read. Reads before that are hidden behind
  prefill, and their time is in no span but in `RequestTiming.kv_read_s`
- first_decode: from being in the batch with its first token to the second one
- decode: from the second token to the last
- more: everything behind the last span that there is room for
"""


class EngineSpan(Struct, frozen=True, array_like=True):
    """One stretch."""

    name: SpanName
    seconds: float
    num_steps: int = 0
    """Steps of the engine that the request took part in: of `prefill`, its chunks."""
    is_on_prefill: bool = False
    """Whether it was on the prefill engine, when it is told by the decode engine."""


class RequestTiming(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request's time on an engine, from its arrival there to now or to its end."""

    spans: tuple[EngineSpan, ...] = ()
    """In order, without gaps. At most `engine.marks.MAX_SPANS`, and the few of a prefill engine."""
    kv_read_s: float = 0.0
    """Seconds that reads of its blocks took, hidden ones included; reads beside each other count one by one."""
    kv_read_bytes: int = 0

    @property
    def total_s(self) -> float:
        """From arrival to the end of the last span."""
        return sum(span.seconds for span in self.spans)

    def seconds_in(self, *names: SpanName) -> float:
        """Seconds in all spans of these names."""
        return sum(span.seconds for span in self.spans if span.name in names)


TimelineState = Literal["kept", "running", "unknown"]


class TimelineQuery(Struct, frozen=True, kw_only=True, tag="timeline_query"):
    """An ingress asks another one for the timeline of a request."""

    call_id: int
    request_id: str
    """Of the answer or of the request."""


class TimelineAnswer(Struct, frozen=True, kw_only=True, tag="timeline"):
    """Answer to `TimelineQuery`."""

    call_id: int
    state: TimelineState
    text: bytes = b""
    """The timeline as JSON, if it was kept."""
