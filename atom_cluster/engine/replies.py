"""What clients hear: token deltas gathered over one turn of the engine, one message per client, and their timing."""

from __future__ import annotations

from collections.abc import Callable

from atom_cluster.engine.protocols import Outbox
from atom_cluster.engine.request import Request
from atom_cluster.engine.results import NewTokens
from atom_cluster.errors import AtomClusterError, InvalidRequest, NotReady, Overloaded
from atom_cluster.messages.requests import (
    FinishReason,
    RequestError,
    RequestTiming,
    TokenBatch,
    TokenDelta,
)
from atom_cluster.observability.metrics import (
    E2E_S,
    GENERATION_TOKENS,
    ITL_S,
    QUEUE_S,
    REQUESTS_FINISHED,
    REQUESTS_MOVED,
    TTFT_S,
    MetricSink,
)


class Replies:
    """Collects deltas until `flush`. Each token of a request goes out once, in order."""

    def __init__(self, outbox: Outbox, metrics: MetricSink, clock: Callable[[], float]) -> None:
        self._outbox = outbox
        self._metrics = metrics
        self._clock = clock
        self._deltas_by_client: dict[str, list[TokenDelta]] = {}

    def tokens(self, request: Request, new: NewTokens) -> None:
        """Tokens that the request's `tokens` already end with, and maybe its end."""
        now_s = self._clock()
        if request.first_token_s is None:
            request.first_token_s = now_s
            if not request.num_replayed:  # else its client has had the first token long since
                self._metrics.observe(TTFT_S, now_s - request.arrived_s)
            self._metrics.observe(QUEUE_S, (request.scheduled_s or now_s) - request.arrived_s)
        elif request.last_token_s is not None:
            self._metrics.observe(ITL_S, (now_s - request.last_token_s) / len(new.token_ids))
        request.last_token_s = now_s
        self._metrics.inc(GENERATION_TOKENS, len(new.token_ids))
        self._put(
            request,
            TokenDelta(
                request_id=request.request_id,
                first_index=request.num_output - len(new.token_ids),
                token_ids=new.token_ids,
                logprobs=new.logprobs,
                finish_reason=new.finish_reason,
                num_cached_tokens=min(request.num_cached or 0, request.num_prompt),
                timing=None if new.finish_reason is None else self._timing(request),
            ),
        )

    def end(self, request: Request, reason: FinishReason) -> None:
        """The request has all its tokens already."""
        self._put(
            request,
            TokenDelta(
                request_id=request.request_id,
                first_index=request.num_output,
                finish_reason=reason,
                timing=self._timing(request),
            ),
        )

    def error(self, request: Request, error: AtomClusterError) -> None:
        """The request ends without its answer."""
        self._put(request, error_delta(request.request_id, request.num_output, error))

    def move(self, request: Request, error: NotReady) -> None:
        """The request is to go on with another engine, behind what its client has."""
        self._metrics.inc(REQUESTS_MOVED)
        deltas = self._deltas_by_client.setdefault(request.client, [])
        deltas.append(error_delta(request.request_id, request.num_output, error))

    def refuse(self, client: str, request_id: str, error: AtomClusterError) -> None:
        """A request that never became one."""
        if not isinstance(error, NotReady):
            self._metrics.inc(REQUESTS_FINISHED, reason="error")
        self._deltas_by_client.setdefault(client, []).append(error_delta(request_id, 0, error))

    def flush(self) -> None:
        """Send what was gathered."""
        for client, deltas in self._deltas_by_client.items():
            self._outbox.send(client, TokenBatch(tuple(deltas)))
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

    def _timing(self, request: Request) -> RequestTiming:
        scheduled_s = request.arrived_s if request.scheduled_s is None else request.scheduled_s
        first_s = scheduled_s if request.first_token_s is None else request.first_token_s
        last_s = first_s if request.last_token_s is None else request.last_token_s
        return RequestTiming(
            queue_s=scheduled_s - request.arrived_s, prefill_s=first_s - scheduled_s, decode_s=last_s - first_s
        )


def error_delta(request_id: str, first_index: int, error: AtomClusterError) -> TokenDelta:
    """The last delta of a request that failed."""
    wire_error = RequestError(
        kind=type(error).__name__,
        message=str(error),
        param=error.param if isinstance(error, InvalidRequest) else None,
        retry_after_s=error.retry_after_s if isinstance(error, Overloaded) else None,
    )
    return TokenDelta(request_id=request_id, first_index=first_index, finish_reason="error", error=wire_error)
