"""The router actor around its state: cards over Serve, everything else over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
import ray
from ray import serve

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.parallel import GroupConfig
from atom_cluster.config.serving import ServingConfig
from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.codec import Message
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.link.lived_time import LivedTime
from atom_cluster.messages.cluster import (
    CacheSnapshot,
    MemberCard,
    PeerAddress,
    ReplicaLoad,
    RequestDone,
    RouteDecision,
    RouteQuery,
    SnapshotRequest,
)
from atom_cluster.messages.requests import CancelRequest
from atom_cluster.observability.metrics import NullMetrics
from atom_cluster.serving import router as router_module
from atom_cluster.serving.router import Router
from tests.fakes import VirtualClock
from tests.serving.conftest import eventually

SECRET = b"a secret of the cluster"


class Member:
    """An engine or an ingress that records what the router sends."""

    def __init__(self, peer_id: str) -> None:
        self.received: list[Message] = []
        self.router = ""
        self.endpoint = Endpoint(
            key=ClusterKey.from_secret(SECRET),
            peer_id=peer_id,
            host="127.0.0.1",
            epoch=5,
            on_message=self._receive,
            on_lost=lambda peer_id: None,
            ping_period_s=0.1,
        )

    def _receive(self, source: str, message: Message) -> None:
        self.router = source
        self.received.append(message)

    def card(self) -> MemberCard:
        return MemberCard(
            address=self.endpoint.address, kind="engine", role="unified", fingerprint="f", num_blocks=9, block_size=4
        )

    def has(self, kind: type[Message]) -> bool:
        return any(isinstance(message, kind) for message in self.received)


class Actor(Router):
    """Serve awaits `__del__`, which is `leave` here: the interpreter would call it again, and await nothing."""

    async def leave(self) -> None:
        await Router.__del__(self)

    def __del__(self) -> None:  # type: ignore[override]
        pass


class Scene:
    """A router, made as Serve makes it, and members."""

    def __init__(self) -> None:
        self.router = Actor.__new__(Actor)
        self.members: list[Member] = []

    async def member(self, peer_id: str) -> Member:
        member = Member(peer_id)
        await member.endpoint.start()
        self.members.append(member)
        return member

    async def route(self, ingress: Member, query_id: int, address: PeerAddress) -> RouteDecision:
        """What the router says to a query."""
        ingress.endpoint.send(address, query(query_id))
        await eventually(lambda: any(decision.query_id == query_id for decision in decisions(ingress)))
        return decisions(ingress)[-1]


def query(query_id: int, *block_hashes: int) -> RouteQuery:
    return RouteQuery(query_id=query_id, block_hashes=(block_hashes,), num_tokens=40, expected_output_tokens=8)


def decisions(ingress: Member) -> list[RouteDecision]:
    return [message for message in ingress.received if isinstance(message, RouteDecision)]


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(router_module, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(router_module, "cluster_secret", lambda: SECRET)
    monkeypatch.setattr(router_module, "RayMetrics", lambda labels: NullMetrics())
    scene = Scene()
    serving = ServingConfig(ping_period_s=0.1, client_timeout_s=1.0)
    config = ClusterConfig(model="m", unified=GroupConfig(), serving=serving)
    await scene.router.__init__(config)  # type: ignore[misc]  # as Serve does
    yield scene
    await scene.router.leave()
    for member in scene.members:
        await member.endpoint.close()


async def test_an_engine_that_announces_itself_is_asked_for_its_cache_and_gets_requests(scene: Scene) -> None:
    engine, ingress = await scene.member("engine"), await scene.member("ingress")
    membership = await scene.router.announce(engine.card())
    assert [card.address.peer_id for card in membership.members] == ["engine"]
    await eventually(lambda: SnapshotRequest(5) in engine.received)
    decision = await scene.route(ingress, 1, membership.router)
    assert decision.decode == engine.endpoint.address and decision.prefill is None


async def test_cache_and_load_reports_decide_where_requests_go(scene: Scene) -> None:
    engines, ingress = [await scene.member(f"engine{number}") for number in range(3)], await scene.member("ingress")
    for engine in engines:
        membership = await scene.router.announce(engine.card())
    for engine, hashes in zip(engines, ((), (11, 12, 13), ())):
        await eventually(lambda engine=engine: engine.has(SnapshotRequest))
        peer_id = engine.endpoint.address.peer_id
        engine.endpoint.send(engine.router, CacheSnapshot(peer_id=peer_id, epoch=5, next_seq=0, hashes=hashes))
        load = ReplicaLoad(
            peer_id=peer_id,
            epoch=5,
            num_running=0,
            num_waiting=0,
            num_waiting_tokens=0,
            num_free_blocks=9,
            num_blocks=9,
        )
        engine.endpoint.send(engine.router, load)
    await eventually(lambda: scene.router._state.num_index_blocks == 3)
    ingress.endpoint.send(membership.router, query(1, 11, 12, 13))
    await eventually(lambda: bool(decisions(ingress)))
    (decision,) = decisions(ingress)
    assert decision.decode is not None and decision.decode.peer_id == "engine1"
    assert decision.decode_cached_blocks == 3
    ingress.endpoint.send(membership.router, RequestDone(1))


async def test_nobody_is_an_answer_too(scene: Scene) -> None:
    ingress = await scene.member("ingress")
    membership = await scene.router.announce(
        MemberCard(address=ingress.endpoint.address, kind="ingress", node="n", pid=1)
    )
    decision = await scene.route(ingress, 1, membership.router)
    assert decision.decode is None and decision.reason == "no_engine"


async def test_an_engine_that_withdraws_or_is_lost_gets_no_more_requests(scene: Scene) -> None:
    leaving, dying, ingress = [await scene.member(name) for name in ("leaving", "dying", "ingress")]
    for engine in (leaving, dying):
        membership = await scene.router.announce(engine.card())
    await eventually(lambda: leaving.has(SnapshotRequest) and dying.has(SnapshotRequest))
    left = await scene.router.withdraw(leaving.endpoint.address)
    assert [card.address.peer_id for card in left.members] == ["dying"]
    decision = await scene.route(ingress, 1, membership.router)
    assert decision.decode == dying.endpoint.address
    scene.members.remove(dying)
    await dying.endpoint.close()
    await eventually(lambda: not scene.router._state.membership(0.0).members)
    assert (await scene.route(ingress, 2, membership.router)).decode is None


async def test_an_engine_that_was_lost_and_announces_itself_again_is_asked_for_its_cache_again(scene: Scene) -> None:
    engine = await scene.member("engine")
    await scene.router.announce(engine.card())
    await eventually(lambda: engine.has(SnapshotRequest))
    await scene.router.withdraw(engine.endpoint.address)
    engine.received.clear()
    membership = await scene.router.announce(engine.card())
    assert len(membership.members) == 1
    await eventually(lambda: engine.has(SnapshotRequest))


async def test_a_router_that_stood_still_keeps_its_members_and_one_that_did_not_leaves_the_silent_out(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = VirtualClock()
    monkeypatch.setattr(scene.router, "_lived", LivedTime(1.0, clock))
    engines = [await scene.member(f"engine{number}") for number in range(2)]
    for engine in engines:
        await scene.router.announce(engine.card())
    clock.sleep(60.0)
    assert len((await scene.router.announce(engines[0].card())).members) == 2
    for _ in range(8):
        clock.sleep(0.5)
        membership = await scene.router.announce(engines[0].card())
    assert [card.address.peer_id for card in membership.members] == ["engine0"]


async def test_a_message_that_is_not_for_routers_is_dropped(scene: Scene) -> None:
    ingress = await scene.member("ingress")
    address = (await scene.router.announce(ingress.card())).router
    ingress.endpoint.send(address, CancelRequest("r"))
    assert (await scene.route(ingress, 1, address)).query_id == 1


async def test_an_ingress_that_stands_still_is_ended_when_another_has_come(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(namespace="serve"))
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: f"{namespace}/{name}")
    monkeypatch.setattr(ray, "kill", killed.append)
    clock = VirtualClock()
    monkeypatch.setattr(scene.router, "_lived", LivedTime(1.0, clock))
    old, new = [
        MemberCard(address=PeerAddress(peer_id=name, endpoint="", epoch=1), kind="ingress", actor=f"actor of {name}")
        for name in ("old", "new")
    ]
    await scene.router.announce(old)
    await scene.router.announce(new)
    clock.sleep(60.0)  # the router itself stood still
    await scene.router.announce(new)
    assert killed == []
    for _ in range(10):
        clock.sleep(1.0)
        await scene.router.announce(new)
    await eventually(lambda: killed == ["serve/actor of old"])
