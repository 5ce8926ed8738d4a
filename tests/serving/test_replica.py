"""The head of a replica: health, load and leaving, with a gang that is only pretended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace

import pytest
from ray import serve

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.load import load_args
from atom_cluster.errors import GangError
from atom_cluster.gang.gang import Gang
from atom_cluster.gang.spec import GangSpec
from atom_cluster.messages.cluster import EngineStatus, MemberCard
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import GANG_FAILED_CHECKS, GANG_HEALTHY, GANG_START_S
from atom_cluster.serving import replica as replica_module
from atom_cluster.serving.autoscaling import REQUESTS
from atom_cluster.serving.replica import EngineReplica
from tests.serving.conftest import FakeRouterHandle, engine_card, eventually

BUSY = EngineStatus(num_running=3, num_waiting=4, num_tickets=0, blocks_by_state={"free": 1})


class Head(EngineReplica):
    """Serve awaits `__del__`, which is `leave` here: the interpreter would call it again, and await nothing."""

    async def leave(self) -> None:
        await EngineReplica.__del__(self)

    def __del__(self) -> None:  # type: ignore[override]
        pass


class FakeGang:
    """A gang that says what it is told to, and notes what it was asked."""

    def __init__(self) -> None:
        self.card: MemberCard = engine_card()
        self.failure: GangError | None = None
        self.num_busy_polls = 0
        """How often it has something left to do when asked."""
        self.events: list[str] = []

    async def check(self) -> EngineStatus:
        if self.failure is not None:
            raise self.failure
        return BUSY

    async def begin_drain(self, timeout_s: float) -> None:
        self.drain_timeout_s = timeout_s
        self.events.append("begin_drain")

    async def is_idle(self) -> bool:
        self.events.append("is_idle")
        self.num_busy_polls -= 1
        return self.num_busy_polls < 0

    async def stop(self) -> None:
        self.events.append("stop")

    def kill(self) -> None:
        self.events.append("kill")


StartReplica = Callable[..., Awaitable[Head]]


@pytest.fixture
def gang() -> FakeGang:
    return FakeGang()


@pytest.fixture
def metrics() -> MemoryMetrics:
    return MemoryMetrics()


@pytest.fixture
async def start(
    gang: FakeGang, metrics: MemoryMetrics, router_handle: FakeRouterHandle, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StartReplica]:
    """Makes a replica as Serve does."""
    started: list[Head] = []

    async def start_gang(spec: GangSpec) -> FakeGang:
        assert spec.host_settings.peer_id == "unified-r1"  # type: ignore[attr-defined]
        if gang.failure is not None:
            raise gang.failure
        return gang

    async def start_replica(drain_timeout_s: float = 5.0) -> Head:
        serving = {"drain_timeout_s": drain_timeout_s, "announce_period_s": 0.01}
        config: ClusterConfig = load_args({"model": "m", "unified": {"device": "cpu"}, "serving": serving})
        replica = Head.__new__(Head)
        started.append(replica)
        await replica.__init__(config, {}, "unified", router_handle)  # type: ignore[misc]
        return replica

    monkeypatch.setattr(replica_module, "RayMetrics", lambda **_: metrics)
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(Gang, "start", start_gang)
    yield start_replica
    for replica in started:
        await replica.leave()


async def test_a_replica_announces_its_engine_with_its_latest_status(
    start: StartReplica, router_handle: FakeRouterHandle
) -> None:
    replica = await start()
    await eventually(lambda: bool(router_handle.cards))
    assert router_handle.cards[0].address == engine_card().address and router_handle.cards[0].status is None
    await replica.check_health()
    await eventually(lambda: router_handle.cards[-1].status == BUSY)
    assert not router_handle.cards[-1].is_draining


async def test_whether_the_gang_is_well_is_recorded(
    start: StartReplica, gang: FakeGang, metrics: MemoryMetrics
) -> None:
    replica = await start()
    assert metrics.series(GANG_START_S) and not metrics.series(GANG_HEALTHY)
    await replica.check_health()
    assert metrics.series(GANG_HEALTHY) == {(): 1.0}
    gang.failure = GangError("rank 1: its process is dead")
    with pytest.raises(GangError):
        await replica.check_health()
    assert metrics.series(GANG_HEALTHY) == {(): 0.0} and metrics.value(GANG_FAILED_CHECKS) == 1
    gang.failure = None
    await replica.check_health()
    assert metrics.value(GANG_HEALTHY) == 1


async def test_serve_is_told_the_engines_requests(start: StartReplica) -> None:
    replica = await start()
    assert await replica.record_autoscaling_stats() == {REQUESTS: 0.0}
    await replica.check_health()
    assert await replica.record_autoscaling_stats() == {REQUESTS: 7.0}


async def test_a_failed_gang_is_reported_to_serve_and_withdrawn_from_the_router(
    start: StartReplica, gang: FakeGang, router_handle: FakeRouterHandle
) -> None:
    replica = await start()
    gang.failure = GangError("rank 0: its process is dead")
    with pytest.raises(GangError, match="rank 0"):
        await replica.check_health()
    assert router_handle.withdrawn == [engine_card().address]
    num_cards = len(router_handle.cards)
    with pytest.raises(GangError):
        await replica.check_health()
    assert len(router_handle.cards) == num_cards


async def test_a_gang_that_was_only_slow_to_answer_is_announced_again(
    start: StartReplica, gang: FakeGang, router_handle: FakeRouterHandle
) -> None:
    replica = await start()
    gang.failure = GangError("rank 0: it does not answer")
    with pytest.raises(GangError):
        await replica.check_health()
    gang.failure = None
    num_cards = len(router_handle.cards)
    await replica.check_health()
    await eventually(lambda: len(router_handle.cards) > num_cards)


async def test_a_replica_told_to_stop_says_so_finishes_its_requests_and_leaves(
    start: StartReplica, gang: FakeGang, router_handle: FakeRouterHandle
) -> None:
    replica = await start()
    gang.num_busy_polls = 2
    await replica.leave()
    assert gang.events == ["begin_drain", "is_idle", "is_idle", "is_idle", "stop"]
    assert gang.drain_timeout_s == pytest.approx(4.0), "time to move what is left is kept"
    assert router_handle.cards[-1].is_draining
    assert router_handle.withdrawn == [engine_card().address]


async def test_a_drain_takes_no_longer_than_it_may(start: StartReplica, gang: FakeGang) -> None:
    replica = await start(drain_timeout_s=0.25)
    gang.num_busy_polls = 10_000
    await replica.leave()
    assert gang.events[-1] == "stop" and gang.events.count("is_idle") < 10


async def test_a_gang_that_stands_still_while_it_drains_is_not_waited_for(start: StartReplica, gang: FakeGang) -> None:
    replica = await start(drain_timeout_s=60.0)
    gang.num_busy_polls = 10_000
    gang.failure = GangError("rank 1: it does not answer")
    await replica.leave()
    assert gang.events == ["begin_drain", "is_idle", "kill"]


async def test_a_gang_that_dies_while_it_drains_is_ended_all_the_same(
    start: StartReplica, gang: FakeGang, router_handle: FakeRouterHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> bool:
        raise GangError("rank 0: its process is dead")

    replica = await start()
    monkeypatch.setattr(gang, "is_idle", fail)
    await replica.leave()
    assert gang.events[-1] == "kill" and router_handle.withdrawn == [engine_card().address]


async def test_a_replica_whose_gang_did_not_start_has_nothing_to_stop(
    start: StartReplica, gang: FakeGang, router_handle: FakeRouterHandle
) -> None:
    gang.failure = GangError("rank 1: out of memory")
    with pytest.raises(GangError, match="out of memory"):
        await start()
    assert gang.events == [] and router_handle.withdrawn == []
