"""What an engine tells the router and its operators: cache events in order, load when it changed, gauges."""

from __future__ import annotations

from collections.abc import Callable

from atom_cluster.engine.protocols import ROUTER, Outbox
from atom_cluster.engine.request import Request
from atom_cluster.engine.scheduler import ScheduledStep
from atom_cluster.kv_cache.block_pool import BlockPool
from atom_cluster.messages.cluster import (
    CacheEvents,
    CacheSnapshot,
    EngineSpeed,
    EngineStatus,
    PeerAddress,
    ReplicaLoad,
)
from atom_cluster.observability.metrics import (
    KV_BLOCKS,
    KV_PAGES,
    PREFIX_CACHE_HITS,
    PREFIX_CACHE_QUERIES,
    REQUESTS_RUNNING,
    REQUESTS_WAITING,
    TICKETS_OPEN,
    WAITING_TOKENS,
    MetricSink,
)


def count_admissions(step: ScheduledStep, metrics: MetricSink) -> None:
    """Count what was looked up in the prefix cache for requests that enter with this step.

    Once per request: not when it comes back after a preemption or with a first token from prefill, and not on prefill.
    """
    new_rows = {row.row for row in step.new_rows}
    for request in (row.request for row in step.rows if row.request.row in new_rows):
        if request.ticket_id is None and request.residence == 1 and not request.num_new:
            count_prefix(request, metrics)


def count_prefix(request: Request, metrics: MetricSink) -> None:
    """Count a prompt that was looked up."""
    metrics.inc(PREFIX_CACHE_QUERIES, request.num_initial)
    metrics.inc(PREFIX_CACHE_HITS, request.num_cached or 0)


class CacheReporter:
    """Sends at most one report per period, and none while nothing changed."""

    def __init__(
        self,
        *,
        pool: BlockPool,
        outbox: Outbox,
        metrics: MetricSink,
        peer: PeerAddress,
        period_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._outbox = outbox
        self._metrics = metrics
        self._peer = peer
        self._period_s = period_s
        self._clock = clock
        self._reported_s = -period_s
        self._last_load: ReplicaLoad | None = None

    def report(
        self, stats: EngineStatus, count_waiting_tokens: Callable[[], int], speed: Callable[[], EngineSpeed]
    ) -> None:
        """Tell what changed since the last report, if it is time; only then are tokens counted and speeds looked up."""
        now_s = self._clock()
        if now_s - self._reported_s < self._period_s:
            return
        self._reported_s = now_s
        self._send_events()
        num_waiting_tokens = count_waiting_tokens()
        load = ReplicaLoad(
            peer_id=self._peer.peer_id,
            epoch=self._peer.epoch,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_waiting_tokens=num_waiting_tokens,
            num_free_blocks=self._pool.num_available,
            num_blocks=self._pool.num_blocks,
            speed=speed(),
        )
        self._set_gauges(stats, num_waiting_tokens)
        if load != self._last_load:
            self._last_load = load
            self._outbox.send(ROUTER, load)

    def send_snapshot(self) -> None:
        """Everything that the cache holds, for a router that knows nothing yet."""
        self._pool.take_changes()
        self._outbox.send(
            ROUTER,
            CacheSnapshot(
                peer_id=self._peer.peer_id,
                epoch=self._peer.epoch,
                next_seq=self._pool.num_events,
                hashes=self._pool.cached_hashes,
            ),
        )
        self._last_load = None
        self._reported_s = -self._period_s

    def _send_events(self) -> None:
        first_seq, stored, removed = self._pool.take_changes()
        if stored or removed:
            self._outbox.send(
                ROUTER,
                CacheEvents(
                    peer_id=self._peer.peer_id,
                    epoch=self._peer.epoch,
                    first_seq=first_seq,
                    stored=stored,
                    removed=removed,
                ),
            )

    def _set_gauges(self, stats: EngineStatus, num_waiting_tokens: int) -> None:
        self._metrics.set(REQUESTS_RUNNING, stats.num_running)
        self._metrics.set(REQUESTS_WAITING, stats.num_waiting)
        self._metrics.set(WAITING_TOKENS, num_waiting_tokens)
        self._metrics.set(TICKETS_OPEN, stats.num_tickets)
        for state, count in stats.blocks_by_state.items():
            self._metrics.set(KV_BLOCKS, count, state=state)
        for group, counts in stats.other_pages_by_state.items():
            for state, count in counts.items():
                self._metrics.set(KV_PAGES, count, group=group, state=state)
