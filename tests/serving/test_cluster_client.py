"""The ingress's client against scripted engines and a scripted router on real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest

from atom_cluster.api.generator import GenerateInput
from atom_cluster.api.model_files import ServedModel
from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.parallel import GroupConfig
from atom_cluster.config.routing import RoutingConfig
from atom_cluster.errors import NotReady, RequestFailed
from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.codec import Message
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import MemberCard, Membership, PeerAddress, RouteDecision, RouteQuery
from atom_cluster.messages.requests import (
    CancelRequest,
    EngineRequest,
    RequestError,
    SamplingParams,
    TokenBatch,
    TokenDelta,
)
from atom_cluster.observability.metrics import NullMetrics
from atom_cluster.serving.cluster_client import ClusterClient
from atom_cluster.serving.streams import EngineLost

KEY = ClusterKey.from_secret(b"a secret of the cluster")


class Peer:
    """An endpoint with a script: `answer` is called with each message."""

    def __init__(self, peer_id: str, answer: Callable[[Peer, str, Message], None]) -> None:
        self.received: list[Message] = []
        self._answer = answer
        self.endpoint = Endpoint(
            key=KEY,
            peer_id=peer_id,
            host="127.0.0.1",
            epoch=1,
            on_message=self._receive,
            on_lost=lambda peer_id: None,
            ping_period_s=0.2,
        )

    def _receive(self, source: str, message: Message) -> None:
        self.received.append(message)
        self._answer(self, source, message)

    def card(self) -> MemberCard:
        return MemberCard(
            address=self.endpoint.address, kind="engine", role="unified", fingerprint="f", num_blocks=9, block_size=4
        )


def count_up(peer: Peer, source: str, message: Message) -> None:
    """An engine whose tokens are 0, 1, 2, ..., one delta each."""
    if isinstance(message, EngineRequest):
        total = message.sampling.max_tokens or 0
        for index in range(total):
            finish = "length" if index == total - 1 else None
            delta = TokenDelta(
                request_id=message.request_id, first_index=index, token_ids=(index,), finish_reason=finish
            )
            peer.endpoint.send(source, TokenBatch((delta,)))


def say_one_token(peer: Peer, source: str, message: Message) -> None:
    if isinstance(message, EngineRequest):
        delta = TokenDelta(request_id=message.request_id, first_index=0, token_ids=(0,))
        peer.endpoint.send(source, TokenBatch((delta,)))


def refuse(peer: Peer, source: str, message: Message) -> None:
    if isinstance(message, EngineRequest):
        error = RequestError(kind="NotReady", message="draining")
        delta = TokenDelta(request_id=message.request_id, first_index=0, finish_reason="error", error=error)
        peer.endpoint.send(source, TokenBatch((delta,)))


def refuse_to_place(peer: Peer, source: str, message: Message) -> None:
    """A router that has just started."""
    if isinstance(message, RouteQuery):
        peer.endpoint.send(source, RouteDecision(query_id=message.query_id, decode=None, reason="no_engine"))


def ignore(peer: Peer, source: str, message: Message) -> None:
    """Take everything, say nothing."""


class Cluster:
    """A client, a router that walks through `order`, and engines."""

    def __init__(self) -> None:
        config = ClusterConfig(model="m", unified=GroupConfig(), router=RoutingConfig(query_timeout_s=0.1))
        model = ServedModel(name="m", max_model_len=100, vocab_size=50, eos_token_ids=(1,))
        self.client = ClusterClient(config=config, reasons={}, model=model, metrics=NullMetrics())
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
        self.queries: list[RouteQuery] = []
        self.engines: list[Peer] = []

    def _route(self, peer: Peer, source: str, message: Message) -> None:
        if isinstance(message, RouteQuery):
            self.queries.append(message)
            if self.order:
                decision = RouteDecision(query_id=message.query_id, decode=self.order.pop(0), reason="load")
                peer.endpoint.send(source, decision)

    async def add(self, peer_id: str, answer: Callable[[Peer, str, Message], None]) -> Peer:
        engine = Peer(peer_id, answer)
        await engine.endpoint.start()
        self.engines.append(engine)
        members = tuple(engine.card() for engine in self.engines)
        self.client.update(Membership(router=self.router.endpoint.address, members=members))
        return engine

    async def generate(self, request_id: str = "r", max_tokens: int = 5) -> list[int]:
        tokens: list[int] = []
        async with aclosing(self.client.generate(request_of(request_id, max_tokens))) as deltas:
            async for delta in deltas:
                tokens.extend(delta.token_ids)
        return tokens


def request_of(request_id: str, max_tokens: int) -> GenerateInput:
    sampling = SamplingParams(max_tokens=max_tokens, seed=0)
    return GenerateInput(request_id=request_id, token_ids=tuple(range(10)), sampling=sampling)


async def eventually(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        await asyncio.sleep(0.005)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    await cluster.router.endpoint.start()
    await cluster.endpoint.start()
    cluster.client.attach(cluster.endpoint)
    yield cluster
    await cluster.endpoint.close()
    for peer in [cluster.router, *cluster.engines]:
        await peer.endpoint.close()


async def test_requests_go_where_the_router_says(cluster: Cluster) -> None:
    first, second = await cluster.add("first", ignore), await cluster.add("second", count_up)
    cluster.order = [second.endpoint.address] * 20
    results = await asyncio.gather(*(cluster.generate(f"r{number}", 5 + number) for number in range(20)))
    assert results == [list(range(5 + number)) for number in range(20)]
    assert first.received == []
    assert len(cluster.queries[0].block_hashes) == 2  # ten tokens in blocks of four


async def test_a_silent_router_is_not_waited_for(cluster: Cluster) -> None:
    await cluster.add("only", count_up)
    assert await cluster.generate() == [0, 1, 2, 3, 4]


async def test_a_new_router_that_knows_nobody_yet_does_not_make_the_ingress_forget(cluster: Cluster) -> None:
    await cluster.add("only", count_up)
    newer = Peer("newer router", refuse_to_place)
    await newer.endpoint.start()
    cluster.client.update(Membership(router=newer.endpoint.address, members=()))
    assert await cluster.generate() == [0, 1, 2, 3, 4]
    await newer.endpoint.close()


async def test_without_any_engine_the_request_is_refused(cluster: Cluster) -> None:
    with pytest.raises(NotReady):
        await cluster.generate()


@pytest.mark.parametrize("bad", [refuse, ignore])
async def test_a_request_without_a_token_moves_to_another_engine(
    cluster: Cluster, bad: Callable[[Peer, str, Message], None]
) -> None:
    first, second = await cluster.add("first", bad), await cluster.add("second", count_up)
    cluster.order = [first.endpoint.address, second.endpoint.address]
    running = asyncio.create_task(cluster.generate())
    await eventually(lambda: len(first.received) == 1)
    if bad is ignore:
        cluster.client.lose("first")
    assert await running == [0, 1, 2, 3, 4]
    assert cluster.queries[1].excluded == ("first",)


async def test_a_request_with_a_token_fails_with_its_engine(cluster: Cluster) -> None:
    engine = await cluster.add("first", say_one_token)
    cluster.order = [engine.endpoint.address]
    deltas = cluster.client.generate(request_of("r", 5))
    assert (await deltas.__anext__()).token_ids == (0,)
    cluster.client.lose("first")
    with pytest.raises(EngineLost):
        await deltas.__anext__()


async def test_losing_every_engine_in_turn_is_an_error_that_says_so(cluster: Cluster) -> None:
    engines = [await cluster.add(f"engine{number}", ignore) for number in range(3)]
    cluster.order = [engine.endpoint.address for engine in engines]
    running = asyncio.create_task(cluster.generate())
    for engine in engines:
        await eventually(lambda engine=engine: bool(engine.received))
        cluster.client.lose(engine.card().address.peer_id)
    with pytest.raises(RequestFailed, match="3 engines were lost"):
        await running


async def test_leaving_early_cancels_the_request_and_nothing_stays_behind(cluster: Cluster) -> None:
    engine = await cluster.add("first", say_one_token)
    cluster.order = [engine.endpoint.address]
    async with aclosing(cluster.client.generate(request_of("r", 5))) as deltas:
        await deltas.__anext__()
    await eventually(lambda: CancelRequest("r") in engine.received)
    assert not cluster.client.has_open_requests


async def test_a_request_that_is_cancelled_just_as_the_router_answers_reaches_no_engine(cluster: Cluster) -> None:
    engine = await cluster.add("first", ignore)
    running = asyncio.create_task(cluster.generate())
    await eventually(lambda: len(cluster.queries) == 1)
    decision = RouteDecision(query_id=cluster.queries[0].query_id, decode=engine.endpoint.address, reason="load")
    cluster.client.receive("router", decision)
    running.cancel()
    await asyncio.wait((running,), timeout=1.0)
    assert running.cancelled()
    assert not cluster.client.has_open_requests and engine.received == []
