"""What clients hear: token deltas gathered over one turn of the engine, one message per client, and their timing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import msgspec

from atom_cluster.engine.protocols import Outbox
from atom_cluster.engine.request import Phase, Request
from atom_cluster.engine.results import NewTokens
from atom_cluster.errors import AtomClusterError, InvalidRequest, NotReady
from atom_cluster.messages.failures import message_of
from atom_cluster.messages.requests import FinishReason, TokenBatch, TokenDelta
from atom_cluster.observability.logging import get_logger
from atom_cluster.observability.metrics import (
    E2E_S,
    GENERATION_TOKENS,
    ITL_S,
    QUEUE_S,
    REQUEST_ERRORS,
    REQUESTS_FINISHED,
    REQUESTS_MOVED,
    TTFT_S,
    MetricSink,
)
from atom_cluster.observability.recent_errors import RecentErrors

_logger = get_logger(__name__)


class Replies:
    """Collects deltas until `flush`. Each token of a request goes out once, in order."""

    def __init__(self, outbox: Outbox, metrics: MetricSink, clock: Callable[[], float]) -> None:
        self._outbox = outbox
        self._metrics = metrics
        self._clock = clock
        self._deltas_by_client: dict[str, list[TokenDelta]] = {}
        self._num_tokens = 0
        """Not counted in the metric yet: that once per turn costs less than once per row."""
        self.errors = RecentErrors()
        """What went wrong here, of late."""

    def tokens(self, request: Request, new: NewTokens) -> None:
        """Tokens that the request's `tokens` already end with, and maybe its end."""
        now_s = self._clock()
        is_first = request.first_token_s is None
        self._observe_times(request, len(new.token_ids), now_s)
        timing = request.marks.timing(now_s) if is_first or new.finish_reason is not None else None
        if request.phase is Phase.RUNNING:  # else it waits, for its blocks or for its turn
            request.marks.begin("first_decode" if is_first else "decode", now_s)
        self._num_tokens += len(new.token_ids)
        self._put(
            request,
            TokenDelta(
                request_id=request.request_id,
                first_index=request.num_output - len(new.token_ids),
                token_ids=new.token_ids,
                logprobs=new.logprobs,
                prompt_logprobs=request.take_prompt_scores(),
                finish_reason=new.finish_reason,
                num_cached_tokens=min(request.num_cached or 0, request.num_prompt),
                timing=timing,
            ),
        )

    def _observe_times(self, request: Request, num_tokens: int, now_s: float) -> None:
        if request.first_token_s is None:
            request.first_token_s = now_s
            # Of one that was replayed, its client has had the first token long since.
            if num_tokens and not request.num_replayed:
                self._metrics.observe(TTFT_S, now_s - request.arrived_s)
            self._metrics.observe(QUEUE_S, (request.scheduled_s or now_s) - request.arrived_s)
        elif request.last_token_s is not None:
            self._metrics.observe(ITL_S, (now_s - request.last_token_s) / num_tokens)
        request.last_token_s = now_s

    def end(self, request: Request, reason: FinishReason) -> None:
        """The request has all its tokens already."""
        self._put(
            request,
            TokenDelta(
                request_id=request.request_id,
                first_index=request.num_output,
                finish_reason=reason,
                timing=request.marks.timing(self._clock()),
            ),
        )

    def error(self, request: Request, error: AtomClusterError) -> None:
        """The request ends without its answer."""
        self._note_error(error)
        self._put(request, self._error_delta(request, error))

    def move(self, request: Request, error: NotReady) -> None:
        """The request is to go on with another engine, behind what its client has."""
        self._metrics.inc(REQUESTS_MOVED)
        deltas = self._deltas_by_client.setdefault(request.client, [])
        deltas.append(self._error_delta(request, error))

    def refuse(self, client: str, request_id: str, error: AtomClusterError) -> None:
        """A request that never became one."""
        self._note_error(error)
        if not isinstance(error, NotReady):
            self._metrics.inc(REQUESTS_FINISHED, reason="error")
        self._deltas_by_client.setdefault(client, []).append(error_delta(request_id, 0, error))

    def _note_error(self, error: AtomClusterError) -> None:
        self._metrics.inc(REQUEST_ERRORS, kind=type(error).__name__)
        if not isinstance(error, InvalidRequest):
            self.errors.note(type(error).__name__, str(error))

    def flush(self) -> None:
        """Send what was gathered."""
        if self._num_tokens:
            self._metrics.inc(GENERATION_TOKENS, self._num_tokens)
            self._num_tokens = 0
        for client, deltas in self._deltas_by_client.items():
            for batch in _batches(deltas):
                self._outbox.send(client, TokenBatch(batch))
        self._deltas_by_client.clear()

    def forget(self, client: str) -> None:
        """A client is gone."""
        self._deltas_by_client.pop(client, None)

    def _put(self, request: Request, delta: TokenDelta) -> None:
        self._deltas_by_client.setdefault(request.client, []).append(delta)
        if delta.finish_reason is not None:
            self.note_end(request, delta.finish_reason)

    def note_end(self, request: Request, reason: FinishReason) -> None:
        """Count a request that ended, with or without a word to its client."""
        self._metrics.inc(REQUESTS_FINISHED, reason=reason)
        self._metrics.observe(E2E_S, self._clock() - request.arrived_s)
        if _logger.isEnabledFor(logging.DEBUG):
            _logger.bind(**request.log_fields).debug("ended with %d tokens: %s", request.num_output, reason)

    def _error_delta(self, request: Request, error: AtomClusterError) -> TokenDelta:
        delta = error_delta(request.request_id, request.num_output, error)
        return msgspec.structs.replace(delta, timing=request.marks.timing(self._clock()))


def _batches(deltas: Sequence[TokenDelta]) -> Iterator[tuple[TokenDelta, ...]]:
    """Messages of a turn to one client, in order: one, but that scores of a prompt, which are long, come alone."""
    start = 0
    for end, delta in enumerate(deltas):
        if delta.prompt_logprobs is not None:
            if deltas[start:end]:
                yield tuple(deltas[start:end])
            yield (delta,)
            start = end + 1
    if deltas[start:]:
        yield tuple(deltas[start:])


def error_delta(request_id: str, first_index: int, error: AtomClusterError) -> TokenDelta:
    """The last delta of a request that failed."""
    return TokenDelta(request_id=request_id, first_index=first_index, finish_reason="error", error=message_of(error))
