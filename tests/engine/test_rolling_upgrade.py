"""A rolling upgrade: engines of two versions side by side under load, placed by a real router, nothing fails."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

import msgspec
import pytest

from atom_cluster.config.routing import RoutingConfig
from atom_cluster.engine.protocols import RunnerInfo
from atom_cluster.messages.cluster import (
    CacheEvents,
    CacheSnapshot,
    MemberCard,
    PeerAddress,
    ReplicaLoad,
    RequestDone,
    Role,
    RouteQuery,
)
from atom_cluster.messages.transfer import KvPublication, PrefillFailed, PrefillOrder
from atom_cluster.observability.metrics import NullMetrics
from atom_cluster.routing.state import RouterState
from tests.factories import (
    BLOCK_SIZE,
    assert_clean,
    expected_tokens,
    make_engine,
    make_message,
    make_prompt,
    make_runner,
)
from tests.fakes import Network, RecordingRunner, VirtualClock


class VersionedRunner(RecordingRunner):
    """A runner of one version of the code."""

    version = ""

    @property
    def info(self) -> RunnerInfo:
        info = super().info
        return dataclasses.replace(info, fingerprint_fields={**info.fingerprint_fields, "code": self.version})


@dataclass
class Cluster:
    """Engines of several versions, and a router that places requests."""

    policy: str
    network: Network = field(default_factory=lambda: Network(VirtualClock()))
    cards: dict[str, MemberCard] = field(default_factory=dict)
    placed: dict[str, tuple[str, str | None, tuple[int, ...], int]] = field(default_factory=dict)
    """By request id: decode, prefill, prompt, tokens to come."""
    reasons: list[str] = field(default_factory=list)
    numbers: random.Random = field(default_factory=lambda: random.Random(4))

    def __post_init__(self) -> None:
        self.router = RouterState(
            config=RoutingConfig(policy=self.policy),  # type: ignore[arg-type]
            address=PeerAddress(peer_id="router", endpoint="", epoch=1),
            member_timeout_s=1e9,
            min_remote_tokens=1,
            metrics=NullMetrics(),
        )

    def start(self, peer_id: str, role: Role, version: str) -> None:
        runner = VersionedRunner(make_runner(self.network.clock))
        runner.version = version
        engine = make_engine(self.network, peer_id, runner=runner)
        engine.request_snapshot()
        self.cards[peer_id] = MemberCard(
            address=self.network.addresses[peer_id],
            kind="engine",
            role=role,
            fingerprint=engine.fingerprint,
            block_size=BLOCK_SIZE,
            num_blocks=64,
        )
        self.router.announce(self.cards[peer_id], self.network.clock.at_s)

    def drain(self, peer_id: str) -> None:
        """No new requests for it."""
        self.cards[peer_id] = msgspec.structs.replace(self.cards[peer_id], is_draining=True)
        self.router.announce(self.cards[peer_id], self.network.clock.at_s)

    def stop(self, peer_id: str) -> None:
        """It has nothing left to do, and leaves."""
        self.settle()
        assert_clean(self.network.engines[peer_id])
        del self.cards[peer_id]
        self.router.withdraw(peer_id)
        self.network.remove(peer_id)
        for engine in self.network.engines.values():
            engine.drop_peer(peer_id)

    def send(self, num_requests: int) -> None:
        """Requests, a turn of the cluster after each."""
        for _ in range(num_requests):
            number = len(self.placed)
            prompt, num_tokens = (
                make_prompt(self.numbers.randrange(6, 40), seed=number % 7),
                self.numbers.randrange(1, 12),
            )
            query = RouteQuery(
                query_id=number, block_hashes=(), num_tokens=len(prompt), expected_output_tokens=num_tokens
            )
            decision = self.router.decide(query, source="ingress", now_s=self.network.clock.at_s)
            assert decision.decode is not None
            self.reasons.append(decision.reason)
            prefill = None if decision.prefill is None else decision.prefill.peer_id
            request_id = f"r{number}"
            self.placed[request_id] = (decision.decode.peer_id, prefill, prompt, num_tokens)
            message = make_message(request_id, prompt, num_tokens, prefill=decision.prefill)
            self.network.engines[decision.decode.peer_id].put("ingress", message)
            self.turn()

    def turn(self) -> None:
        self.network.turn()
        for message in self.network.to_router:
            if isinstance(message, (CacheEvents, CacheSnapshot, ReplicaLoad)):
                self.router.apply(message, self.network.clock.at_s)
        self.network.to_router.clear()
        for request_id, answer in self.network.answers.items():
            if answer.reason is not None:
                self.router.done(RequestDone(int(request_id[1:])), source="ingress")

    def settle(self) -> None:
        self.network.settle()

    def check(self) -> None:
        """Every request got its whole answer, and no two engines of different versions had to do with each other."""
        for request_id, (_, _, prompt, num_tokens) in self.placed.items():
            answer = self.network.answers[request_id]
            assert (answer.reason, answer.tokens) == ("length", expected_tokens(prompt, num_tokens)), request_id
        assert not self.network.messages(PrefillFailed)
        assert self.network.messages(KvPublication)
        assert all(source[-1] == target[-1] for source, target, _ in self.network.carried), "mixed pairs"
        assert not any(engine.stats().num_mismatches for engine in self.network.engines.values())

    def orders_to(self, peer_id: str) -> int:
        return sum(target == peer_id and isinstance(m, PrefillOrder) for _, target, m in self.network.carried)


@pytest.mark.parametrize("policy", ["prefix_and_load", "least_loaded", "round_robin"])
def test_an_upgrade_replica_by_replica_fails_nothing_and_mixes_nothing(policy: str) -> None:
    cluster = Cluster(policy)
    for name in ("p-a-1", "p-b-1"):
        cluster.start(name, "prefill", "1")
    for name in ("d-a-1", "d-b-1"):
        cluster.start(name, "decode", "1")
    cluster.send(20)
    # The first decode replica of the new version finds no partner, and computes prompts itself.
    cluster.drain("d-a-1")
    cluster.start("d-a-2", "decode", "2")
    cluster.send(20)
    alone = {reason for reason, (decode, _, _, _) in zip(cluster.reasons, cluster.placed.values()) if decode == "d-a-2"}
    assert alone == {"fingerprint_mismatch"}
    assert all(prefill is None for decode, prefill, _, _ in cluster.placed.values() if decode == "d-a-2")
    # A prefill replica of the new version comes, and the two are a pair.
    cluster.drain("p-a-1")
    cluster.start("p-a-2", "prefill", "2")
    cluster.send(20)
    assert cluster.orders_to("p-a-2") > 0 and cluster.orders_to("p-b-1") > 0
    # The rest follows; the last old decode replica goes on alone when its last partner has left.
    cluster.drain("p-b-1")
    cluster.settle()
    for name in ("d-a-1", "p-a-1", "p-b-1"):
        cluster.stop(name)
    cluster.send(20)
    cluster.drain("d-b-1")
    cluster.start("d-b-2", "decode", "2")
    cluster.start("p-b-2", "prefill", "2")
    cluster.send(20)
    cluster.settle()
    cluster.stop("d-b-1")
    cluster.send(10)
    cluster.settle()
    cluster.check()
    assert {name: orders for name in cluster.cards if (orders := cluster.orders_to(name))}.keys() == {"p-a-2", "p-b-2"}


def test_a_pair_of_two_versions_that_somebody_names_all_the_same_refuses_with_what_differs() -> None:
    cluster = Cluster("least_loaded")
    cluster.start("p-1", "prefill", "1")
    cluster.start("d-2", "decode", "2")
    prompt = make_prompt(20)
    message = make_message("r", prompt, 4, prefill=cluster.network.addresses["p-1"])
    cluster.network.engines["d-2"].put("ingress", message)
    cluster.settle()
    (refusal,) = cluster.network.messages(PrefillFailed)
    assert isinstance(refusal, PrefillFailed)
    assert refusal.message == "prefill and decode differ in code (1 on prefill, 2 on decode)"
    assert cluster.network.answers["r"].tokens == expected_tokens(prompt, 4)
    assert [engine.stats().num_mismatches for engine in cluster.network.engines.values()] == [1, 0]
