"""When an answer's tokens reach its client, as far as this process can know: recorded right before the socket.

A load generator at the other end of the connection measures the same, but for the network and the proxy. Knows nothing
of what is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from atom_cluster.observability.metrics import (
    HTTP_ITL_S,
    HTTP_OUTPUT_TOKENS,
    HTTP_PROMPT_TOKENS,
    HTTP_REQUEST_S,
    HTTP_TPOT_S,
    HTTP_TTFT_S,
    MetricSink,
)


class CountedOutput(Protocol):
    """An output whose tokens are counted."""

    index: int
    first_token_at_s: float | None
    last_token_at_s: float | None

    @property
    def num_tokens(self) -> int:
        """Output tokens so far."""
        ...


class _Written:
    """What was written of one output so far."""

    __slots__ = ("first_s", "last_s", "num_tokens")

    def __init__(self) -> None:
        self.num_tokens = 0
        self.first_s = self.last_s = 0.0


class AnswerTimes:
    """Follows one answer and records it when it has ended, well or not."""

    def __init__(
        self,
        outputs: Sequence[CountedOutput],
        *,
        route: str,
        arrived_at_s: float,
        metrics: MetricSink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`outputs`: all, each at its index. `route`: the template. `arrived_at_s`: of the request, on `clock`."""
        self._outputs = outputs
        self._route = route
        self._arrived_at_s = arrived_at_s
        self._metrics = metrics
        self._clock = clock
        self._written = [_Written() for _ in outputs]

    def write(self, grown: Iterable[CountedOutput]) -> None:
        """A piece of a stream is about to be written, with all tokens that the outputs have by now.

        `grown`: those of them that got tokens since the last piece; an answer may have hundreds, of which few did.
        """
        now_s = self._clock()
        for output in grown:
            written = self._written[output.index]
            if written.num_tokens:
                self._metrics.observe(HTTP_ITL_S, now_s - written.last_s, route=self._route)
            else:
                written.first_s = now_s
            written.last_s, written.num_tokens = now_s, output.num_tokens

    def end(self, *, num_prompt_tokens: int) -> None:
        """The answer has ended. Without any token only its duration is recorded."""
        metrics, route = self._metrics, self._route
        metrics.observe(HTTP_REQUEST_S, self._clock() - self._arrived_at_s, route=route)
        spans = [span for output, written in zip(self._outputs, self._written) if (span := _span(output, written))]
        if not spans:
            return
        metrics.observe(HTTP_TTFT_S, min(first_s for first_s, _, _ in spans) - self._arrived_at_s, route=route)
        for first_s, last_s, num_tokens in spans:
            if num_tokens > 1:
                metrics.observe(HTTP_TPOT_S, (last_s - first_s) / (num_tokens - 1), route=route)
        metrics.observe(HTTP_PROMPT_TOKENS, num_prompt_tokens, route=route)
        metrics.observe(HTTP_OUTPUT_TOKENS, sum(output.num_tokens for output in self._outputs), route=route)


def _span(output: CountedOutput, written: _Written) -> tuple[float, float, int] | None:
    """First and last token, and how many: as written, or as they came if nothing was written before the end."""
    if written.num_tokens:
        return written.first_s, written.last_s, written.num_tokens
    if output.first_token_at_s is None or output.last_token_at_s is None:
        return None
    return output.first_token_at_s, output.last_token_at_s, output.num_tokens
