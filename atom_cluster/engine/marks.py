"""Marks: what a request was doing when, in stretches that follow each other. Kept by the engine for every request.

A span begins where the one before ends, so that they cannot fail to add up. Knows nothing of requests, of clients or
of what the names mean (`messages.timing`).
"""

from __future__ import annotations

from collections.abc import Sequence

from atom_cluster.messages.timing import EngineSpan, RequestTiming, SpanName

MAX_SPANS = 32
"""Of one request. One that is preempted again and again has its later ones in a single span called `more`."""


class Marks:
    """Spans of one request, of which the last is still running. Times are seconds of the engine's clock."""

    __slots__ = ("_began_s", "_name", "_read_bytes", "_read_s", "_spans", "num_steps")

    def __init__(self, now_s: float) -> None:
        self._spans: list[EngineSpan] = []
        self._name: SpanName = "queue"
        self._began_s = now_s
        self._read_s, self._read_bytes = 0.0, 0
        self.num_steps = 0
        """Steps in the running span, for the engine to count."""

    def begin(self, name: SpanName, now_s: float) -> None:
        """The running span ends and another begins, unless it is of this name already."""
        if name == self._name or self._name == "more":
            return
        if len(self._spans) == MAX_SPANS - 1:
            self._name = "more"
            return
        self._end(now_s)
        self._name = name

    def split(self, remote: Sequence[EngineSpan], *, arrived_s: float, now_s: float) -> None:
        """The running span ends, and was: a way there, `remote` spans of another engine, a way back that ended at
        `arrived_s`, and waiting from then on. How much of the way was which, nobody can tell: half of it is."""
        way_s = arrived_s - self._began_s - sum(span.seconds for span in remote)
        self._spans += [
            EngineSpan("wire", way_s / 2),
            *(EngineSpan(span.name, span.seconds, span.num_steps, is_on_prefill=True) for span in remote[:MAX_SPANS]),
            EngineSpan("wire", way_s / 2),
        ]
        self._name, self._began_s = "step_wait", arrived_s
        self._end(now_s)
        self._name = "kv_transfer"

    def note_read(self, seconds: float, num_bytes: int) -> None:
        """Blocks were read, beside whatever is running."""
        self._read_s += seconds
        self._read_bytes += num_bytes

    def timing(self, now_s: float) -> RequestTiming:
        """All spans, with the running one up to now."""
        running = EngineSpan(self._name, now_s - self._began_s, self.num_steps)
        return RequestTiming(spans=(*self._spans, running), kv_read_s=self._read_s, kv_read_bytes=self._read_bytes)

    def _end(self, now_s: float) -> None:
        self._spans.append(EngineSpan(self._name, now_s - self._began_s, self.num_steps))
        self._began_s = now_s
        self.num_steps = 0
