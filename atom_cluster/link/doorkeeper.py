"""Doorkeeper: watches a listening ZMQ socket for strangers, says who was refused and why, bounds how many there are.

libzmq refuses whoever does not prove to be a member, and says nothing of it; it lets any number of connections stand
in its door. What a stranger can hold is bounded here: a descriptor for `HANDSHAKE_S`, and of those as many as
`MAX_STRANGERS`. Members are let in by libzmq; this class neither sees their messages nor decides about them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from atom_cluster.link.auth import HANDSHAKE_S
from atom_cluster.observability.refusals import RefusalLog

MAX_STRANGERS = 256
"""Connections that have proved nothing yet; members on their way in are among them. One more is closed at once."""

_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
"""Not HANDSHAKE_FAILED_PROTOCOL: telling it makes libzmq 4.3.5 forget the error it tells of, and keep a connection
whose bytes it cannot read. Such a connection just ends."""
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILURES

_Socket = zmq.Socket[bytes]


@dataclass(slots=True)
class _Visitor:
    """A connection that was accepted a short while ago."""

    source: str | None
    since_s: float
    is_refused: bool
    """Closed by us, and told already."""
    is_member: bool = False


class Doorkeeper:
    """Call `watch` when `monitor` is readable, and now and then. Owns the monitor; `close` is idempotent."""

    def __init__(
        self,
        listener: _Socket,
        *,
        logger: logging.Logger,
        max_strangers: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """listener: not bound yet."""
        self._listener = listener
        self._max_strangers = MAX_STRANGERS if max_strangers is None else max_strangers
        self._clock = clock
        self._log = RefusalLog(logger, "connections")
        self._visitors: dict[int, _Visitor] = {}
        """By descriptor."""
        self._num_members_among = 0
        """How many more of them are members: libzmq does not say which, if there are several."""
        self._failure = ""
        """Why the connection whose end is told next was refused."""
        self.monitor: _Socket = listener.get_monitor_socket(_EVENTS)

    @property
    def num_strangers(self) -> int:
        """Connections that have proved nothing yet."""
        return sum(not visitor.is_member for visitor in self._visitors.values()) - self._num_members_among

    def watch(self) -> None:
        """Take in what happened at the door."""
        while not self.monitor.closed:
            try:
                event = recv_monitor_message(self.monitor, zmq.DONTWAIT)
            except zmq.Again:
                break
            self._take(int(event["event"]), int(event["value"]))
        self._forget_old()
        self._log.flush()

    def close(self) -> None:
        """Before the listener is closed."""
        if not self.monitor.closed:
            self._listener.disable_monitor()
            self.monitor.close(linger=0)

    def _take(self, event: int, value: int) -> None:
        # One thread of libzmq tells the events of all connections, and the end of a connection right after its failure.
        if event == zmq.EVENT_ACCEPTED:
            self._accept(value)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._let_in()
        elif event & _FAILURES:
            self._failure = self._failure or _reason(event, value)
        elif event == zmq.EVENT_DISCONNECTED:
            self._end(value)

    def _accept(self, descriptor: int) -> None:
        source, is_refused = None, False
        with contextlib.suppress(OSError), _copy_of(descriptor) as connection:
            # It may have ended, who speaks nonsense has, and its number may be that of something else by now.
            if connection.getsockname()[:2] == _address_of(self._listener):
                source = str(connection.getpeername()[0])
                is_refused = self.num_strangers >= self._max_strangers
                if is_refused:
                    self._log.note(source, "too many strangers at the door")
                    connection.shutdown(socket.SHUT_RDWR)
        self._visitors[descriptor] = _Visitor(source, self._clock(), is_refused)

    def _let_in(self) -> None:
        candidates = [visitor for visitor in self._visitors.values() if not visitor.is_member]
        if len(candidates) == 1:
            candidates[0].is_member = True
        else:
            self._num_members_among += 1

    def _end(self, descriptor: int) -> None:
        failure, self._failure = self._failure, ""
        visitor = self._visitors.pop(descriptor, None)
        if visitor is None or visitor.is_member or visitor.is_refused:
            return
        if not failure and self._num_members_among:
            self._num_members_among -= 1  # most likely one of them
        else:
            self._log.note(visitor.source, failure or "another secret, or not a member's protocol")
        self._limit_members()

    def _forget_old(self) -> None:
        """Libzmq has closed the strangers among them, so that the others are members."""
        oldest_s = self._clock() - 2 * HANDSHAKE_S
        for descriptor in [key for key, visitor in self._visitors.items() if visitor.since_s < oldest_s]:
            if not self._visitors.pop(descriptor).is_member:
                self._num_members_among = max(0, self._num_members_among - 1)
        self._limit_members()

    def _limit_members(self) -> None:
        num_unknown = sum(not visitor.is_member for visitor in self._visitors.values())
        self._num_members_among = min(self._num_members_among, num_unknown)


@contextlib.contextmanager
def _copy_of(descriptor: int) -> Iterator[socket.socket]:
    """A socket of libzmq's, through a descriptor of our own. Raises OSError if it is none."""
    copy = os.dup(descriptor)
    try:
        connection = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with connection:
        yield connection


def _address_of(listener: _Socket) -> tuple[str, int]:
    endpoint = listener.get(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    host, _, port = endpoint.rstrip(b"\0").decode().removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def _reason(event: int, value: int) -> str:
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "not a member"
    return f"nothing said in {HANDSHAKE_S:.0f} s" if value == errno.EAGAIN else "it left before it was let in"
