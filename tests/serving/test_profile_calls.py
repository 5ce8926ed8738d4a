"""Profiler windows of several engines, over real sockets; one engine's trouble is not the others'."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from atom_cluster.api.operating.profile_types import ProfileRequest, ProfileTarget
from atom_cluster.errors import InvalidRequest, NotReady, ProfileRefused
from atom_cluster.link.codec import Message
from atom_cluster.messages.profile import ProfileAnswer, StartProfile, StopProfile
from tests.serving.test_cluster_client import Cluster, Peer, eventually, ignore


def record(peer: Peer, source: str, message: Message) -> None:
    """An engine that opens windows and has a trace when they are closed."""
    if isinstance(message, StartProfile):
        peer.endpoint.send(source, ProfileAnswer(call_id=message.call_id))
    elif isinstance(message, StopProfile):
        peer.endpoint.send(source, ProfileAnswer(call_id=message.call_id, files=("trace",)))


def refuse(peer: Peer, source: str, message: Message) -> None:
    if isinstance(message, (StartProfile, StopProfile)):
        peer.endpoint.send(source, ProfileAnswer(call_id=message.call_id, error="no window is open"))


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


async def test_every_engine_is_asked_and_answers_for_itself(cluster: Cluster) -> None:
    first = await cluster.add("a", record)
    await cluster.add("b", refuse)
    started = await cluster.client.start_profile(ProfileRequest(num_steps=4, with_stack=False))
    assert [entry["replica"] for entry in started["replicas"]] == ["a", "b"]
    assert [entry.get("error") for entry in started["replicas"]] == [None, "no window is open"]
    (message,) = [message for message in first.received if isinstance(message, StartProfile)]
    assert (message.num_steps, message.with_stack, message.record_shapes) == (4, False, None)
    stopped = await cluster.client.stop_profile(ProfileTarget())
    assert stopped["replicas"][0] == {"replica": "a", "role": "unified", "node": "", "files": ["trace"]}


async def test_only_the_engines_that_are_named_are_asked(cluster: Cluster) -> None:
    first, second = await cluster.add("a", record), await cluster.add("b", record)
    answer = await cluster.client.start_profile(ProfileRequest(replicas=["b"]))
    assert [entry["replica"] for entry in answer["replicas"]] == ["b"]
    assert not any(isinstance(message, StartProfile) for message in first.received)
    assert any(isinstance(message, StartProfile) for message in second.received)
    with pytest.raises(InvalidRequest, match="no replica is called 'c'; there are a, b"):
        await cluster.client.start_profile(ProfileRequest(replicas=["c"]))
    with pytest.raises(InvalidRequest, match="no replica has such a role"):
        await cluster.client.stop_profile(ProfileTarget(roles=["prefill"]))


async def test_when_all_refuse_the_call_is_refused(cluster: Cluster) -> None:
    await cluster.add("a", refuse)
    with pytest.raises(ProfileRefused, match="a: no window is open"):
        await cluster.client.stop_profile(ProfileTarget())


async def test_an_engine_that_is_lost_meanwhile_does_not_hold_up_the_others(cluster: Cluster) -> None:
    await cluster.add("a", record)
    lost = await cluster.add("b", ignore)
    call = asyncio.ensure_future(cluster.client.stop_profile(ProfileTarget()))
    await eventually(lambda: any(isinstance(message, StopProfile) for message in lost.received))
    cluster.engines.remove(lost)
    await lost.endpoint.close()
    answer = await asyncio.wait_for(call, 20)
    assert [entry.get("error") for entry in answer["replicas"]] == [None, "the replica was lost"]
    assert answer["replicas"][0]["files"] == ["trace"]


async def test_without_engines_there_is_nobody_to_ask(cluster: Cluster) -> None:
    with pytest.raises(NotReady):
        await cluster.client.start_profile(ProfileRequest())
