"""What an engine tells the router and its operators: cache events in order, load when it changed, gauges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from atom_cluster.engine.decode_side import DecodeSide
from atom_cluster.engine.prefill_side import PrefillSide
from atom_cluster.engine.protocols import ROUTER, Outbox
from atom_cluster.engine.request import Request
from atom_cluster.engine.scheduler import ScheduledStep, Scheduler
from atom_cluster.kv_cache.block_manager import BlockManager
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
    PREFIX_CACHE_BLOCKS,
    PREFIX_CACHE_EVICTIONS,
    PREFIX_CACHE_HITS,
    PREFIX_CACHE_QUERIES,
    REQUESTS_REMOTE,
    REQUESTS_RUNNING,
    REQUESTS_WAITING,
    TICKETS_OPEN,
    WAITING_TOKENS,
    MetricSink,
)
from atom_cluster.observability.recent_errors import RecentErrors


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueDetails:
    """Who waits for what. Every state is named, those of nobody with 0, so that gauges fall again."""

    waiting_by_reason: dict[str, int]
    """As the label of `REQUESTS_WAITING`."""
    num_remote: int
    tickets_by_state: dict[str, int]
    """As the label of `TICKETS_OPEN`."""


def queue_details(scheduler: Scheduler, prefill: PrefillSide, decode: DecodeSide) -> QueueDetails:
    """Looks at every request that waits and every ticket."""
    waiting = {"new": 0, "preempted": 0, "kv_arrived": 0, "grammar": 0, "kv_room": decode.num_queued}
    waiting |= scheduler.waiting_by_reason()
    states = ("computing", "publishing", "published", "asked", "receiving", "draining")
    tickets = Counter(ticket.state_name for ticket in prefill.tickets.all())
    tickets += Counter(ticket.state.value for ticket in decode.tickets.all())
    return QueueDetails(
        waiting_by_reason=waiting,
        num_remote=len(decode.tickets),
        tickets_by_state={state: tickets[state] for state in states},
    )


def take_status(
    scheduler: Scheduler, blocks: BlockManager, prefill: PrefillSide, decode: DecodeSide, errors: RecentErrors
) -> EngineStatus:
    """An engine at this moment; taken several times per step."""
    return EngineStatus(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting + decode.num_queued,
        num_tickets=len(prefill.tickets) + len(decode.tickets),
        blocks_by_state=blocks.pool.counts_by_name(),
        other_pages_by_state=blocks.other_counts(),
        num_mismatches=prefill.num_mismatches + decode.num_mismatches,
        recent_errors=errors.notes(),
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
        self,
        stats: EngineStatus,
        count_waiting_tokens: Callable[[], int],
        speed: Callable[[], EngineSpeed],
        details: Callable[[], QueueDetails],
    ) -> None:
        """Tell what changed since the last report, if it is time; only then are the last three called."""
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
        self._set_gauges(stats, num_waiting_tokens, details())
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
        self._metrics.inc(PREFIX_CACHE_EVICTIONS, len(removed))
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

    def _set_gauges(self, stats: EngineStatus, num_waiting_tokens: int, details: QueueDetails) -> None:
        self._metrics.set(REQUESTS_RUNNING, stats.num_running)
        self._metrics.set(REQUESTS_REMOTE, details.num_remote)
        self._metrics.set(WAITING_TOKENS, num_waiting_tokens)
        self._metrics.set(PREFIX_CACHE_BLOCKS, self._pool.num_findable)
        for reason, count in details.waiting_by_reason.items():
            self._metrics.set(REQUESTS_WAITING, count, reason=reason)
        for state, count in details.tickets_by_state.items():
            self._metrics.set(TICKETS_OPEN, count, state=state)
        for state, count in stats.blocks_by_state.items():
            self._metrics.set(KV_BLOCKS, count, state=state)
        for group, counts in stats.other_pages_by_state.items():
            for state, count in counts.items():
                self._metrics.set(KV_PAGES, count, group=group, state=state)
