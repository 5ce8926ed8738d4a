"""Strangers at an endpoint's door: refused, told, bounded; members come and go as if nobody stood there."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq

from atom_cluster.link import auth, doorkeeper, endpoint
from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.codec import encode
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.requests import CancelRequest
from atom_cluster.observability.refusals import RefusalLog
from tests.link.test_endpoint import SECRET, Node, eventually

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
"""How a ZMQ client with CURVE begins; then comes a proof."""


@pytest.fixture
async def node(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    """It gives strangers half a second, and tells of every one of them."""
    monkeypatch.setattr(auth, "HANDSHAKE_S", 0.5)
    monkeypatch.setattr(doorkeeper, "HANDSHAKE_S", 0.5)
    monkeypatch.setattr(RefusalLog, "__init__", _told_at_once(RefusalLog.__init__))
    found = Node("node")
    await found.endpoint.start()
    yield found
    await found.endpoint.close()


def _told_at_once(init: object) -> object:
    def made(self: object, logger: object, what: str) -> None:
        init(self, logger, what, period_s=0.0)  # type: ignore[operator]

    return made


def knock(found: Endpoint, said: bytes = b"") -> socket.socket:
    host, _, port = found.address.endpoint.removeprefix("tcp://").rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=5)
    sock.sendall(said)
    return sock


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for record in caplog.records if "refused connections" in (line := record.getMessage())]


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def assert_serves(node: Node) -> None:
    """A member that comes now gets its message through."""
    member = Node("member")
    await member.endpoint.start()
    num_before = len(node.received)
    member.endpoint.send(node.endpoint.address, CancelRequest("x"))
    await eventually(lambda: len(node.received) > num_before)
    await member.endpoint.close()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (random.Random(1).randbytes(4000), "not a member"),
        (b"GET / HTTP/1.1\r\n\r\n", "not a member"),
        (b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32), "not a member"),
        (GREETING + b"\x04\xc8" + random.Random(2).randbytes(200), "not a member"),
        (GREETING + b"\x06" + (1 << 62).to_bytes(8, "big") + bytes(1000), ""),
        (b"", "nothing said in"),
        (GREETING[:20], "nothing said in"),
        (GREETING, "nothing said in"),
    ],
    ids=["noise", "http", "no mechanism", "no proof", "endless frame", "silence", "half a greeting", "a greeting only"],
)
async def test_a_stranger_is_refused_and_told(
    node: Node, caplog: pytest.LogCaptureFixture, said: bytes, why: str
) -> None:
    with knock(node.endpoint, said) as sock:
        await eventually(lambda: len(refusals(caplog)) == 1)
        assert why in refusals(caplog)[0]
        # Who speaks nonsense is often gone before one can see where he came from.
        assert "127.0.0.1" in refusals(caplog)[0] or said not in (b"", GREETING[:20], GREETING)
        sock.settimeout(1)
        try:
            while sock.recv(1000):
                pass
        except ConnectionResetError:
            pass
    assert node.received == [] and node.lost == []
    await assert_serves(node)


async def test_another_secret_is_refused_and_told(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    stranger = Node("stranger", secret=b"quite another secret")
    await stranger.endpoint.start()
    stranger.endpoint.send(node.endpoint.address, CancelRequest("x"))
    await eventually(lambda: stranger.lost == ["node"])
    await eventually(lambda: any("another secret" in line for line in refusals(caplog)))
    assert node.received == []
    await stranger.endpoint.close()


async def test_a_member_and_others_leave_without_a_word_in_the_log(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        await assert_serves(node)
    await asyncio.sleep(0.2)
    assert refusals(caplog) == []


async def test_whatever_byte_of_a_members_messages_is_flipped_none_of_another_meaning_arrives(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """From the greeting to the messages: a connection with a flipped byte ends, or the byte meant nothing."""
    all_sent: list[CancelRequest] = []
    num_cut = 0
    for position in [*range(0, 640, 32), *range(640, 900, 8), *range(900, 1600, 90)]:
        sent = [CancelRequest(f"{position:04} {number:04}") for number in range(20)]
        all_sent += sent
        async with Flipping(node.endpoint, position) as flipping:
            num_cut += not await flipping.send(sent, node)
        # Those of the position before may be late.
        received = [message for _, message in node.received]
        assert all(message in all_sent for message in received)
        assert (arrived := [message for message in received if message in sent]) == sent[: len(arrived)]
    assert num_cut >= 20 and refusals(caplog)
    node.received.clear()
    await assert_serves(node)


class Flipping:
    """A member that talks through a line which flips a bit of one byte that it sends."""

    def __init__(self, target: Endpoint, position: int) -> None:
        self._target = target
        self._position = position
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._is_cut = asyncio.Event()

    async def __aenter__(self) -> Flipping:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.reconnect_ivl = -1
        ClusterKey.from_secret(SECRET).configure_client(self._socket)
        port = self._server.sockets[0].getsockname()[1]
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._socket.close()
        await asyncio.to_thread(self._context.term)
        self._server.close()

    async def send(self, messages: list[CancelRequest], node: Node) -> bool:
        """Whether they all arrived; else the connection was cut, or stands still until it will be."""
        for message in messages:
            self._socket.send(encode(message))
        for _ in range(200):
            if (is_all := messages[-1] in [message for _, message in node.received]) or self._is_cut.is_set():
                break
            await asyncio.sleep(0.005)
        return is_all

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.address.endpoint.removeprefix("tcp://").rpartition(":")
        there, to = await asyncio.open_connection(host, int(port))
        forth = asyncio.create_task(self._pass_on(reader, to, flip_at=self._position))
        back = asyncio.create_task(self._pass_on(there, writer, flip_at=-1))
        await asyncio.wait([forth, back], return_when=asyncio.FIRST_COMPLETED)
        self._is_cut.set()
        for task in (forth, back):
            task.cancel()
        await asyncio.gather(forth, back, return_exceptions=True)
        to.close()
        writer.close()

    @staticmethod
    async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, flip_at: int) -> None:
        done = 0
        while data := bytearray(await reader.read(4096)):
            if done <= flip_at < done + len(data):
                data[flip_at - done] ^= 0x10
            done += len(data)
            writer.write(data)
            await writer.drain()


async def test_an_oversized_message_ends_its_connection_only(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_MESSAGE_BYTES", 1000)
    small = Node("small")
    await small.endpoint.start()
    member, other = Node("member"), Node("other")
    for one in (member, other):
        await one.endpoint.start()
    monkeypatch.undo()
    other.endpoint.send(small.endpoint.address, CancelRequest("x"))
    member.endpoint.send(small.endpoint.address, CancelRequest("y" * 5000))
    await eventually(lambda: member.lost == ["small"])
    other.endpoint.send("small", CancelRequest("z"))
    await eventually(lambda: len(small.received) == 2)
    assert [message for _, message in small.received] == [CancelRequest("x"), CancelRequest("z")]
    assert other.lost == []
    for one in (small, member, other):
        await one.endpoint.close()


async def test_a_crowd_of_silent_strangers_takes_few_descriptors_and_for_a_short_time(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "HANDSHAKE_S", 1.0)
    monkeypatch.setattr(doorkeeper, "MAX_STRANGERS", 20)
    crowded = Node("crowded")
    await crowded.endpoint.start()
    member = Node("member")
    await member.endpoint.start()
    member.endpoint.send(crowded.endpoint.address, CancelRequest("before"))
    await eventually(lambda: len(crowded.received) == 1)
    num_before = num_descriptors()
    strangers = []
    for _ in range(300):
        strangers.append(knock(crowded.endpoint))
        await asyncio.sleep(0)
    await eventually(lambda: num_descriptors() - num_before <= 300 + 20)
    assert any("too many strangers" in line for line in refusals(caplog))
    assert member.endpoint.send("crowded", CancelRequest("meanwhile"))
    await eventually(lambda: len(crowded.received) == 2)
    await eventually(lambda: num_descriptors() - num_before == 300)
    for sock in strangers:
        sock.close()
    assert (crowded.lost, member.lost) == ([], [])
    await assert_serves(crowded)
    await member.endpoint.close()
    await crowded.endpoint.close()


def test_the_tests_can_count_descriptors() -> None:
    before = num_descriptors()
    with Path("/proc/self/status").open("rb"):
        assert num_descriptors() == before + 1
