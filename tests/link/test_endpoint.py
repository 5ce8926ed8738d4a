"""Endpoints deliver messages both ways, refuse strangers and notice every way of losing a peer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable

import pytest
import zmq

from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.codec import Message, encode
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.link.slow_line import SlowLine
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import CancelRequest, Ping
from atom_cluster.units import MiB

SECRET = b"a secret of the cluster"


class Node:
    """An endpoint that records what happens to it."""

    def __init__(
        self,
        peer_id: str,
        *,
        secret: bytes = SECRET,
        peer_timeout_s: float = 5.0,
        epoch: int = 1,
        line: SlowLine | None = None,
    ) -> None:
        self.received: list[tuple[str, Message]] = []
        self.lost: list[str] = []
        self.endpoint = Endpoint(
            key=ClusterKey.from_secret(secret),
            peer_id=peer_id,
            host="127.0.0.1",
            epoch=epoch,
            on_message=lambda source, message: self.received.append((source, message)),
            on_lost=self.lost.append,
            ping_period_s=0.1,
            peer_timeout_s=peer_timeout_s,
            line=line,
        )


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


@pytest.fixture
async def nodes() -> AsyncIterator[tuple[Node, Node]]:
    first, second = Node("first"), Node("second")
    await first.endpoint.start()
    await second.endpoint.start()
    yield first, second
    await first.endpoint.close()
    await second.endpoint.close()


async def test_messages_and_replies_arrive_in_order(nodes: tuple[Node, Node]) -> None:
    first, second = nodes
    for number in range(1000):
        assert first.endpoint.send(second.endpoint.address, CancelRequest(str(number)))
    await eventually(lambda: len(second.received) == 1000)
    assert second.received == [("first", CancelRequest(str(number))) for number in range(1000)]
    for number in range(1000):
        assert second.endpoint.send("first", CancelRequest(str(number)))
    await eventually(lambda: len(first.received) == 1000)
    assert first.received == [("second", CancelRequest(str(number))) for number in range(1000)]
    assert first.lost == second.lost == []


async def test_what_comes_through_a_slow_line_comes_late_in_order_and_loses_nobody(nodes: tuple[Node, Node]) -> None:
    first, _ = nodes
    far = Node("far", line=SlowLine(delay_s=0.4, bytes_per_s=MiB))
    address = await far.endpoint.start()
    began_s = time.monotonic()
    for number in range(1000):
        assert first.endpoint.send(address, CancelRequest(str(number)))
    await eventually(lambda: len(far.received) == 1000)
    assert far.received == [("first", CancelRequest(str(number))) for number in range(1000)]
    assert far.endpoint.send("first", CancelRequest("back"))
    await eventually(lambda: first.received == [("far", CancelRequest("back"))])
    assert time.monotonic() - began_s > 2 * 0.2
    assert first.lost == far.lost == []
    await far.endpoint.close()
    await eventually(lambda: first.lost == ["far"])


async def test_a_destination_nobody_knows_is_refused(nodes: tuple[Node, Node]) -> None:
    assert not nodes[0].endpoint.send("stranger", CancelRequest("x"))


async def test_a_peer_that_closes_is_lost_on_both_sides() -> None:
    first, second = Node("first", peer_timeout_s=0.5), Node("second", peer_timeout_s=0.5)
    await first.endpoint.start()
    await second.endpoint.start()
    first.endpoint.send(second.endpoint.address, CancelRequest("x"))
    await eventually(lambda: len(second.received) == 1)
    await second.endpoint.close()
    await eventually(lambda: first.lost == ["second"])
    await first.endpoint.close()


async def test_an_inbound_peer_that_closes_is_lost_long_before_it_was_silent_for_too_long() -> None:
    first, second = Node("first"), Node("second", peer_timeout_s=30.0)
    await first.endpoint.start()
    await second.endpoint.start()
    first.endpoint.connect(second.endpoint.address)
    await asyncio.sleep(0.5)
    assert first.lost == second.lost == []
    await first.endpoint.close()
    await eventually(lambda: second.lost == ["first"])
    assert not second.endpoint.send("first", CancelRequest("x"))
    await second.endpoint.close()


async def test_an_inbound_peer_that_falls_silent_is_lost_and_pings_alone_keep_it() -> None:
    first, second = Node("first"), Node("second", peer_timeout_s=0.5)
    await first.endpoint.start()
    await second.endpoint.start()
    first.endpoint.connect(second.endpoint.address)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    silent = context.socket(zmq.DEALER)
    silent.routing_id = b"silent"
    ClusterKey.from_secret(SECRET).configure_client(silent)
    silent.connect(second.endpoint.address.endpoint)
    silent.send(encode(CancelRequest("x")))
    await eventually(lambda: second.lost == ["silent"])
    await asyncio.sleep(0.7)
    assert second.lost == ["silent"]
    silent.close(linger=0)
    context.term()
    await first.endpoint.close()
    await second.endpoint.close()


async def test_a_process_that_stood_still_takes_nobody_for_silent() -> None:
    """All of a starved machine do: here two, each as a client and as a server of the other."""
    first, second = Node("first", peer_timeout_s=0.6), Node("second", peer_timeout_s=0.6)
    await first.endpoint.start()
    await second.endpoint.start()
    first.endpoint.connect(second.endpoint.address)
    second.endpoint.connect(first.endpoint.address)
    await asyncio.sleep(0.3)
    for _ in range(2):
        time.sleep(0.8)
        await asyncio.sleep(0.15)
    assert first.endpoint.send("second", CancelRequest("x")) and second.endpoint.send("first", CancelRequest("y"))
    await eventually(lambda: len(first.received) == len(second.received) == 1)
    assert first.lost == second.lost == []
    await first.endpoint.close()
    await second.endpoint.close()


async def test_who_was_given_up_meanwhile_is_told_so_once(nodes: tuple[Node, Node]) -> None:
    first, second = nodes
    first.endpoint.send(second.endpoint.address, CancelRequest("x"))
    await eventually(lambda: len(second.received) == 1)
    assert first.lost == []
    second.endpoint.disconnect("first")  # as if it had been silent; its connection is as good as ever
    await eventually(lambda: first.lost == ["second"])
    first.endpoint.send(second.endpoint.address, CancelRequest("y"))
    await eventually(lambda: len(second.received) == 2)
    await asyncio.sleep(0.3)
    assert first.lost == ["second"]


async def test_a_client_that_comes_back_over_another_connection_had_given_its_server_up(
    nodes: tuple[Node, Node],
) -> None:
    first, second = nodes
    first.endpoint.send(second.endpoint.address, CancelRequest("before"))
    await eventually(lambda: len(second.received) == 1)
    first.endpoint.disconnect("second")
    first.endpoint.send(second.endpoint.address, CancelRequest("after"))
    await eventually(lambda: len(second.received) == 2)
    assert second.lost == ["first"], "what came before is over, and what came after is not"
    assert second.endpoint.send("first", CancelRequest("answer"))
    await eventually(lambda: first.received == [("second", CancelRequest("answer"))])
    await asyncio.sleep(0.3)
    assert second.lost == ["first"] and first.lost == []


async def test_an_address_where_nobody_listens_is_lost(nodes: tuple[Node, Node]) -> None:
    first, _ = nodes
    first.endpoint.send(PeerAddress(peer_id="ghost", endpoint="tcp://127.0.0.1:1", epoch=1), CancelRequest("x"))
    await eventually(lambda: first.lost == ["ghost"])


async def test_another_incarnation_at_the_same_address_is_lost(nodes: tuple[Node, Node]) -> None:
    first, second = nodes
    stale = PeerAddress(peer_id="second", endpoint=second.endpoint.address.endpoint, epoch=99)
    first.endpoint.connect(stale)
    await eventually(lambda: first.lost == ["second"])


async def test_a_frozen_process_is_lost_and_a_killed_one_at_once() -> None:
    script = textwrap.dedent(
        """
        import asyncio, sys
        from tests.link.test_endpoint import Node
        async def main():
            node = Node("child")
            print((await node.endpoint.start()).endpoint, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
        """
    )
    node = Node("parent", peer_timeout_s=2.0)
    await node.endpoint.start()
    for kill_signal in (signal.SIGSTOP, signal.SIGKILL):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            line = await asyncio.to_thread(child.stdout.readline)
            node.endpoint.connect(PeerAddress(peer_id="child", endpoint=line.strip(), epoch=1))
            await asyncio.sleep(0.3)
            assert node.lost == []
            os.kill(child.pid, kill_signal)
            await eventually(lambda: node.lost == ["child"])
            child.kill()
        node.lost.clear()
    await node.endpoint.close()


async def test_another_secret_gets_in_neither_as_client_nor_as_server(nodes: tuple[Node, Node]) -> None:
    first, _ = nodes
    stranger = Node("stranger", secret=b"quite another secret", peer_timeout_s=1.0)
    await stranger.endpoint.start()
    stranger.endpoint.send(first.endpoint.address, CancelRequest("x"))
    first.endpoint.send(stranger.endpoint.address, CancelRequest("y"))
    await eventually(lambda: stranger.lost == ["first"] and first.lost == ["stranger"])
    assert first.received == stranger.received == []
    await stranger.endpoint.close()


async def test_a_client_that_knows_only_the_public_key_is_refused(nodes: tuple[Node, Node]) -> None:
    first, second = nodes
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey = ClusterKey.from_secret(SECRET).public
    socket.connect(first.endpoint.address.endpoint)
    socket.send(encode(CancelRequest("x")))
    second.endpoint.send(first.endpoint.address, CancelRequest("after"))
    await eventually(lambda: len(first.received) == 1)
    await asyncio.sleep(0.3)
    assert first.received == [("second", CancelRequest("after"))]
    socket.close()
    context.term()


async def test_garbage_from_a_member_is_dropped_and_the_next_message_arrives(nodes: tuple[Node, Node]) -> None:
    first, second = nodes
    key = ClusterKey.from_secret(SECRET)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    key.configure_client(socket)
    socket.connect(first.endpoint.address.endpoint)
    for frame in (b"", b"\xff" * 100, b"\x81\xa4type\xa4evil", encode(Ping(1))[:-1], b"\x91" * 100_000):
        socket.send(frame)
    socket.send_multipart([b"two", b"frames"])
    second.endpoint.send(first.endpoint.address, CancelRequest("after"))
    await eventually(lambda: len(first.received) == 1)
    socket.close(linger=0)
    context.term()
