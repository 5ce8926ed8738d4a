from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.reporting import CacheReporter, QueueDetails
from atom_cluster.kv_cache.block_pool import BlockPool, Prefix
from atom_cluster.messages.cluster import (
    CacheEvents,
    CacheSnapshot,
    EngineSpeed,
    EngineStatus,
    PeerAddress,
    ReplicaLoad,
)
from atom_cluster.messages.steps import StepResult
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import (
    KV_BLOCKS,
    PREFIX_CACHE_BLOCKS,
    PREFIX_CACHE_EVICTIONS,
    REQUESTS_REMOTE,
    REQUESTS_RUNNING,
    REQUESTS_WAITING,
    TICKETS_OPEN,
)
from atom_cluster.routing.prefix_index import PrefixIndex
from tests.factories import make_engine, make_message, make_prompt, make_runner, pool_of
from tests.fakes import ListOutbox, Network, VirtualClock

PEER = PeerAddress(peer_id="engine", endpoint="tcp://127.0.0.1:1", epoch=1)
NOBODY = QueueDetails(waiting_by_reason={}, num_remote=0, tickets_by_state={})
IDLE = EngineStatus(num_running=0, num_waiting=0, num_tickets=0, blocks_by_state={"free": 4})


@dataclass
class Reports:
    """A reporter with a pool of its own."""

    pool: BlockPool = field(default_factory=lambda: BlockPool(4))
    outbox: ListOutbox = field(default_factory=ListOutbox)
    metrics: MemoryMetrics = field(default_factory=MemoryMetrics)
    clock: VirtualClock = field(default_factory=VirtualClock)
    details: QueueDetails = NOBODY

    def __post_init__(self) -> None:
        self.reporter = CacheReporter(
            pool=self.pool, outbox=self.outbox, metrics=self.metrics, peer=PEER, period_s=0.1, clock=self.clock
        )

    def sent(self) -> list[str]:
        names = [type(message).__name__ for _, message in self.outbox.sent]
        self.outbox.sent.clear()
        return names

    def report(self, status: EngineStatus = IDLE) -> list[str]:
        self.reporter.report(status, lambda: 0, EngineSpeed, lambda: self.details)
        return self.sent()


def test_load_is_reported_when_it_changed_and_not_more_often_than_the_period() -> None:
    reports = Reports()
    busy = EngineStatus(num_running=2, num_waiting=0, num_tickets=0, blocks_by_state={"free": 4})
    assert reports.report() == ["ReplicaLoad"]
    assert reports.report(busy) == []
    reports.clock.sleep(0.2)
    assert reports.report(busy) == ["ReplicaLoad"]
    reports.clock.sleep(0.2)
    assert reports.report(busy) == []


def test_events_come_before_the_load_and_only_if_there_are_any() -> None:
    reports = Reports()
    block_ids = reports.pool.acquire(1, "running")
    assert block_ids is not None
    reports.pool.cache(block_ids[0], Prefix(5, b"", None))
    assert reports.report() == ["CacheEvents", "ReplicaLoad"]
    reports.clock.sleep(0.2)
    assert reports.report() == []


def test_a_snapshot_is_followed_by_the_load_at_once() -> None:
    reports = Reports()
    reports.report()
    reports.reporter.send_snapshot()
    assert reports.sent() == ["CacheSnapshot"]
    assert reports.report() == ["ReplicaLoad"]


def test_what_a_snapshot_told_is_told_to_be_gone_when_it_goes() -> None:
    reports = Reports(pool=BlockPool(1))
    block_ids = reports.pool.acquire(1, "running")
    assert block_ids is not None
    reports.pool.cache(block_ids[0], Prefix(5, b"", None))
    reports.reporter.send_snapshot()
    reports.pool.release(block_ids, "running")
    reports.pool.acquire(1, "running")
    reports.reporter.report(IDLE, lambda: 0, EngineSpeed, lambda: NOBODY)
    snapshot, events = reports.outbox.sent[0][1], reports.outbox.sent[1][1]
    assert isinstance(snapshot, CacheSnapshot)
    assert isinstance(events, CacheEvents)
    assert (snapshot.hashes, snapshot.next_seq) == ((5,), events.first_seq)
    assert (events.stored, events.removed) == ((), (5,))
    assert reports.metrics.value(PREFIX_CACHE_EVICTIONS) == 1
    assert reports.metrics.value(PREFIX_CACHE_BLOCKS) == 0


def test_gauges_follow_even_what_is_no_load() -> None:
    reports = Reports()
    reports.report()
    reports.clock.sleep(0.2)
    leased = EngineStatus(num_running=0, num_waiting=0, num_tickets=3, blocks_by_state={"free": 1, "leased": 3})
    reports.details = QueueDetails(waiting_by_reason={"new": 2}, num_remote=1, tickets_by_state={"published": 3})
    reports.report(leased)
    assert reports.metrics.value(TICKETS_OPEN, state="published") == 3
    assert reports.metrics.value(REQUESTS_WAITING, reason="new") == 2
    assert reports.metrics.value(REQUESTS_REMOTE) == 1
    assert reports.metrics.value(KV_BLOCKS, state="leased") == 3
    assert reports.metrics.value(REQUESTS_RUNNING) == 0


# --- through an engine, into the router's index


def follow(index: PrefixIndex, network: Network) -> list[str]:
    """Give the router what was sent; how each message was taken."""
    outcomes: list[str] = []
    for message in network.to_router:
        if isinstance(message, CacheEvents):
            outcomes.append(index.apply_events(message))
        elif isinstance(message, CacheSnapshot):
            outcomes.append(index.apply_snapshot(message))
    network.to_router.clear()
    return outcomes


def assert_knows(index: PrefixIndex, engine: EngineCore) -> None:
    hashes = pool_of(engine).cached_hashes
    assert index.num_blocks("engine") == len(hashes)
    assert all(index.matched_blocks([block_hash]) for block_hash in hashes)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 25), st.booleans()), min_size=1, max_size=15),
    starts_late=st.booleans(),
)
def test_the_router_knows_exactly_what_is_cached_from_events_or_a_snapshot_and_events(
    requests: list[tuple[int, int, bool]], starts_late: bool
) -> None:
    network = Network(VirtualClock())
    engine = make_engine(network, runner=make_runner(network.clock, num_blocks=14))
    index = PrefixIndex(1000)
    index.track("engine", 1)
    for number, (family, num_tokens, wants_snapshot) in enumerate(requests):
        engine.put("client", make_message(f"r{number}", make_prompt(num_tokens, family), 6))
        for _ in range(4):
            engine.step()
        is_first = starts_late and number == 0
        if is_first:
            network.to_router.clear()
        if wants_snapshot or is_first:
            engine.request_snapshot()
        network.settle()
        network.clock.sleep(1.0)
        engine.step()
        assert set(follow(index, network)) <= {"applied"}
        assert_knows(index, engine)


def test_an_idle_engine_says_nothing() -> None:
    network = Network(VirtualClock())
    engine = make_engine(network)
    engine.put("client", make_message())
    network.settle()
    network.clock.sleep(1.0)
    engine.step()
    last = [message for message in network.to_router if isinstance(message, ReplicaLoad)][-1]
    assert (last.num_running, last.num_waiting, last.num_free_blocks) == (0, 0, 64)
    network.to_router.clear()
    for _ in range(5):
        network.clock.sleep(1.0)
        engine.step()
    assert network.to_router == []


def test_a_report_tells_of_all_that_came_before_it_also_after_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router takes for included what it placed a moment before: such a request would be counted nowhere."""
    network = Network(VirtualClock())
    runner = make_runner(network.clock)
    engine = make_engine(network, runner=runner)
    collect, arrived_s = runner.collect, 0.0

    def collect_slowly(timeout_s: float | None = None) -> StepResult | None:
        nonlocal arrived_s
        if not arrived_s:
            network.clock.sleep(0.1)
            arrived_s = network.clock()
            engine.put("client", make_message("second", make_prompt(20, 1), 50))
            network.clock.sleep(0.3)
        return collect(timeout_s)

    monkeypatch.setattr(runner, "collect", collect_slowly)
    engine.put("client", make_message("first", make_prompt(20), 50))
    while not arrived_s:
        engine.step()
    network.to_router.clear()
    engine.step()
    (load,) = [message for message in network.to_router if isinstance(message, ReplicaLoad)]
    assert load.num_running + load.num_waiting == 2
