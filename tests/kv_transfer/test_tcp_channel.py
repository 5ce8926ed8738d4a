from __future__ import annotations

import logging
import selectors
import socket
from collections.abc import Iterator

import pytest

from atom_cluster.errors import ProtocolError, TransferError
from atom_cluster.kv_transfer.tcp_channel import Channel, ChannelLoop, Session
from tests.kv_transfer.ranks import wait_until


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    listener = socket.create_server(("127.0.0.1", 0))
    theirs = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    listener.close()
    ours.settimeout(0.0)
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def receive(channel: Channel, target: memoryview, count: int) -> None:
    """Let the channel read until `count` bytes of its target have come."""
    before = bytes(target)

    def has_come() -> bool:
        channel.handle(selectors.EVENT_READ)
        return bytes(target[:count]) != before[:count]

    wait_until(has_come)


def test_a_session_gets_the_bytes_it_asks_for_in_order(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    first, second, got = bytearray(3), bytearray(4), []

    def session() -> Session:
        yield memoryview(first)
        got.append(bytes(first))
        yield memoryview(second)
        got.append(bytes(second))
        yield memoryview(bytearray(1))

    channel.run(session())
    theirs.sendall(b"abcdefg")

    def has_got_both() -> bool:
        channel.handle(selectors.EVENT_READ)
        return len(got) == 2

    wait_until(has_got_both)
    assert got == [b"abc", b"defg"]


def test_after_a_divert_the_rest_of_a_view_goes_elsewhere(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    target, scratch, following = bytearray(8), bytearray(8), bytearray(2)

    def session() -> Session:
        yield memoryview(target)
        yield memoryview(following)
        yield memoryview(bytearray(1))

    channel.run(session())
    theirs.sendall(b"12345")
    receive(channel, memoryview(target), 5)
    channel.divert(memoryview(scratch))
    theirs.sendall(b"678xy")
    receive(channel, memoryview(following), 2)
    assert (bytes(target), bytes(scratch[:3]), bytes(following)) == (b"12345\0\0\0", b"678", b"xy")


def test_none_waits_until_everything_is_sent(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    steps = []
    payload = bytes(8 << 20)

    def session() -> Session:
        channel.send(payload, b"", b"end")
        yield None
        steps.append("sent")
        yield memoryview(bytearray(1))

    channel.run(session())
    assert channel.events == selectors.EVENT_WRITE
    received = 0
    while not steps:
        channel.handle(selectors.EVENT_WRITE)
        theirs.settimeout(0.01)
        try:
            received += len(theirs.recv(1 << 20))
        except TimeoutError:
            continue
    assert channel.events == selectors.EVENT_READ
    assert received > 0


def test_a_failing_session_ends_its_channel_but_not_the_loop(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    reasons: list[str] = []

    def session() -> Session:
        yield memoryview(bytearray(1))
        raise ProtocolError("that was not allowed")

    loop = ChannelLoop("test-loop", on_tick=lambda: None)
    loop.start()
    loop.call(lambda: loop.add(channel, session(), reasons.append))
    theirs.sendall(b"x")
    wait_until(lambda: reasons == ["that was not allowed"])
    theirs.settimeout(5)
    assert theirs.recv(1) == b""
    loop.check_alive()
    loop.close()
    loop.close()


def test_a_bug_in_the_loop_is_raised_to_its_owner(caplog: pytest.LogCaptureFixture) -> None:
    def tick() -> float | None:
        raise ZeroDivisionError("a bug")

    loop = ChannelLoop("test-loop", on_tick=tick)
    with caplog.at_level(logging.CRITICAL):
        loop.start()

        def has_failed() -> bool:
            try:
                loop.check_alive()
            except TransferError as exc:
                return "a bug" in str(exc)
            return False

        wait_until(has_failed)
    loop.close()
