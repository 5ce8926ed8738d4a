"""Scripted engines, a scripted router and the ingress's client between them, on real sockets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing

from atom_cluster.api.generator import GenerateInput
from atom_cluster.api.text.model_files import ServedModel
from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.parallel import GroupConfig
from atom_cluster.config.routing import RoutingConfig
from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.serving import ServingConfig
from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.codec import Message
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import MemberCard, Membership, PeerAddress, Role, RouteDecision, RouteQuery
from atom_cluster.messages.requests import EngineRequest, RequestError, SamplingParams, TokenBatch, TokenDelta
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.serving.cluster_client import ClusterClient
from tests.serving.conftest import eventually

KEY = ClusterKey.from_secret(b"a secret of the cluster")
AVOID_S = 0.3
"""How long an engine that was lost is avoided."""
TIMEOUT_S = 5.0


class Peer:
    """An endpoint with a script: `answer` is called with each message."""

    def __init__(
        self,
        peer_id: str,
        answer: Callable[[Peer, str, Message], None],
        *,
        epoch: int = 1,
        role: Role = "unified",
    ) -> None:
        self.role: Role = role
        self.received: list[Message] = []
        self._answer = answer
        self.endpoint = Endpoint(
            key=KEY,
            peer_id=peer_id,
            host="127.0.0.1",
            epoch=epoch,
            on_message=self._receive,
            on_lost=lambda peer_id: None,
            ping_period_s=0.2,
        )

    def _receive(self, source: str, message: Message) -> None:
        self.received.append(message)
        self._answer(self, source, message)

    def card(self) -> MemberCard:
        return MemberCard(
            address=self.endpoint.address, kind="engine", role=self.role, fingerprint="f", num_blocks=9, block_size=4
        )


def say(peer: Peer, client: str, request: EngineRequest, indices: range, *, num_cached: int = 0) -> None:
    """Tokens of an output that is 0, 1, 2, ..., one delta each."""
    total = request.sampling.max_tokens or 0
    for index in indices:
        delta = TokenDelta(
            request_id=request.request_id,
            first_index=index,
            token_ids=(index,),
            finish_reason="length" if index == total - 1 else None,
            num_cached_tokens=num_cached,
        )
        peer.endpoint.send(client, TokenBatch((delta,)))


def count_up(peer: Peer, source: str, message: Message) -> None:
    """An engine that says all that is missing."""
    if isinstance(message, EngineRequest):
        assert message.emitted == tuple(range(len(message.emitted)))
        say(peer, source, message, range(len(message.emitted), message.sampling.max_tokens or 0), num_cached=9)


def say_one_token(peer: Peer, source: str, message: Message) -> None:
    """An engine that says one token, and nothing from then on."""
    if isinstance(message, EngineRequest):
        say(peer, source, message, range(len(message.emitted), len(message.emitted) + 1), num_cached=4)


def say_an_error(kind: str, retry_after_s: float | None = None) -> Callable[[Peer, str, Message], None]:
    def answer(peer: Peer, source: str, message: Message) -> None:
        if isinstance(message, EngineRequest):
            error = RequestError(kind=kind, message="no", retry_after_s=retry_after_s)
            delta = TokenDelta(request_id=message.request_id, first_index=0, finish_reason="error", error=error)
            peer.endpoint.send(source, TokenBatch((delta,)))

    return answer


refuse = say_an_error("NotReady")


def say_one_token_and_fail(peer: Peer, source: str, message: Message) -> None:
    say_one_token(peer, source, message)
    say_an_error("EngineLost")(peer, source, message)


def say_one_token_and_drain(peer: Peer, source: str, message: Message) -> None:
    """An engine that drains, and is out of time."""
    say_one_token(peer, source, message)
    refuse(peer, source, message)


def skip_a_token(peer: Peer, source: str, message: Message) -> None:
    """An engine one of whose messages is lost on the way."""
    if isinstance(message, EngineRequest):
        say(peer, source, message, range(1))
        say(peer, source, message, range(2, message.sampling.max_tokens or 0))


def refuse_to_place(peer: Peer, source: str, message: Message) -> None:
    """A router that has just started."""
    if isinstance(message, RouteQuery):
        peer.endpoint.send(source, RouteDecision(query_id=message.query_id, decode=None, reason="no_engine"))


def ignore(peer: Peer, source: str, message: Message) -> None:
    """Take everything, say nothing."""


class Cluster:
    """A client, a router that walks through `order` and then knows nobody, and engines."""

    def __init__(self, *, query_timeout_s: float = 4.0) -> None:
        """`query_timeout_s`: how long the router is waited for, which on a busy machine may answer late."""
        config = ClusterConfig(
            model="m",
            unified=GroupConfig(),
            router=RoutingConfig(query_timeout_s=query_timeout_s),
            scheduler=SchedulerConfig(max_waiting_requests=3),
            serving=ServingConfig(announce_period_s=0.1, member_timeout_s=AVOID_S, request_timeout_s=TIMEOUT_S),
        )
        model = ServedModel(name="m", max_model_len=100, vocab_size=50, eos_token_ids=(1,))
        self.metrics = MemoryMetrics()
        self.client = ClusterClient(config=config, reasons={}, model=model, metrics=self.metrics)
        self.endpoint = Endpoint(
            key=KEY,
            peer_id="ingress",
            host="127.0.0.1",
            epoch=1,
            on_message=self.client.receive,
            on_lost=self.client.lose,
            ping_period_s=0.2,
        )
        self.router = Peer("router", self._route)
        self.order: list[PeerAddress] = []
        self.router_answers = True
        self.queries: list[RouteQuery] = []
        self.engines: list[Peer] = []

    async def start(self) -> None:
        await self.router.endpoint.start()
        await self.endpoint.start()
        self.client.attach(self.endpoint)

    async def close(self) -> None:
        await self.endpoint.close()
        for peer in [self.router, *self.engines]:
            await peer.endpoint.close()

    def _route(self, peer: Peer, source: str, message: Message) -> None:
        if isinstance(message, RouteQuery):
            self.queries.append(message)
            if self.order:
                decision = RouteDecision(query_id=message.query_id, decode=self.order.pop(0), reason="load")
                peer.endpoint.send(source, decision)
            elif self.router_answers:
                refuse_to_place(peer, source, message)

    async def add(self, peer_id: str, answer: Callable[[Peer, str, Message], None], *, role: Role = "unified") -> Peer:
        engine = Peer(peer_id, answer, role=role)
        await engine.endpoint.start()
        self.engines.append(engine)
        self.announce()
        return engine

    def announce(self) -> None:
        """The router's view comes, in which the engines that were lost still stand."""
        members = tuple(engine.card() for engine in self.engines)
        self.client.update(Membership(router=self.router.endpoint.address, members=members))

    async def remove(self, engine: Peer) -> None:
        """An engine dies, and the router has noticed."""
        self.engines.remove(engine)
        await engine.endpoint.close()
        peer_id = engine.endpoint.address.peer_id
        await eventually(lambda: peer_id not in self.client._engines)
        self.announce()

    async def generate(self, request_id: str = "r", max_tokens: int = 5) -> list[int]:
        tokens: list[int] = []
        async with aclosing(self.client.generate(request_of(request_id, max_tokens))) as deltas:
            async for delta in deltas:
                tokens.extend(delta.token_ids)
        return tokens


def request_of(request_id: str, max_tokens: int) -> GenerateInput:
    sampling = SamplingParams(max_tokens=max_tokens, seed=0)
    return GenerateInput(request_id=request_id, token_ids=tuple(range(10)), sampling=sampling)
