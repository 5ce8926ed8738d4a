"""Endpoint: a process's place on the cluster's network. One listening socket, one connection per peer it talks to.

A message has a source or destination, never a route: replies to a peer that connected to us go back over its
connection, messages to an address open one. Liveness is the endpoint's business: every connection is pinged from both
ends, and a peer that disconnects, restarts, refuses, stops answering or stops reading is reported as lost exactly once
per connection. What a message means is not its business.

Silence counts only while this process is awake to hear it (`lived_time`). Pings and their answers say which connection
and which session they are of, so a process that others have given up, as it stood still or was short of processor time,
is told so as soon as they talk again, and need not guess it from a clock.

All methods are called from the event loop's thread, and none of them blocks.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq
from zmq.utils.monitor import recv_monitor_message

from atom_cluster.errors import ProtocolError
from atom_cluster.link.auth import Authenticator, ClusterKey
from atom_cluster.link.codec import MAX_MESSAGE_BYTES, Message, decode, encode
from atom_cluster.link.doorkeeper import Doorkeeper
from atom_cluster.link.lived_time import LivedTime
from atom_cluster.link.slow_line import SlowLine
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import Ping, Pong
from atom_cluster.observability.refusals import RefusalLog

logger = logging.getLogger(__name__)

MAX_QUEUED_MESSAGES = 20_000
"""Per connection and direction. A peer that lets this many pile up is treated as lost."""
_MESSAGES_PER_TURN = 256
"""Read at most this many before other callbacks of the loop get a turn."""
_LOST_EVENTS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
"""Not HANDSHAKE_FAILED_PROTOCOL: telling it makes libzmq 4.3.5 forget the error it tells of, and keep a connection
whose bytes it cannot read. The end of the connection is told either way."""
_KEEPALIVE_PROBES = 3

_Socket = zmq.Socket[bytes]


@dataclass(slots=True)
class _Connection:
    """A socket that we connected to a peer's endpoint."""

    address: PeerAddress
    socket: _Socket
    monitor: _Socket
    heard_at_s: float
    number: int = field(default_factory=lambda: random.getrandbits(62))
    """Tells the peer this connection from those before it."""
    session: int | None = None
    """What the peer calls the time since it first heard of this process; None before its first answer."""


@dataclass(slots=True)
class _Inbound:
    """A peer that connected to us."""

    session: int
    heard_at_s: float
    connection: int | None = None
    """Its number, as the peer says; None before its first ping."""


class Endpoint:
    """See the module docstring. `start` before anything else, `close` at the end; both once."""

    def __init__(
        self,
        *,
        key: ClusterKey,
        peer_id: str,
        host: str,
        epoch: int,
        on_message: Callable[[str, Message], None],
        on_lost: Callable[[str], None],
        ping_period_s: float = 1.0,
        peer_timeout_s: float = 5.0,
        line: SlowLine | None = None,
    ) -> None:
        """`host` is the node's own address or loopback; a free port is chosen. Callbacks get the peer's id. Others
        connect through `line`, if there is one, which is closed with this."""
        self._key = key
        self._peer_id = peer_id
        self._host = host
        self._epoch = epoch
        self._on_message = on_message
        self._on_lost = on_lost
        self._ping_period_s = ping_period_s
        self._peer_timeout_s = peer_timeout_s
        self._line = line
        self._connections: dict[str, _Connection] = {}
        self._inbound: dict[str, _Inbound] = {}
        self._sessions = itertools.count(1)
        self._lived = LivedTime(ping_period_s)
        self._address: PeerAddress | None = None
        self._num_pings = 0
        self._dropped = RefusalLog(logger, "messages")

    @property
    def address(self) -> PeerAddress:
        """Where others reach this process. Only after `start`."""
        if self._address is None:
            raise RuntimeError("the endpoint has not been started")
        return self._address

    async def start(self) -> PeerAddress:
        """Listen, and return the address."""
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[_Socket] = zmq.Context()
        self._authenticator = Authenticator(self._context, self._key)
        self._listener = self._new_socket(zmq.ROUTER)
        self._listener.router_mandatory = True
        self._listener.router_handover = True
        self._key.configure_server(self._listener)
        self._doorkeeper = Doorkeeper(self._listener, logger=logger)
        port = self._listener.bind_to_random_port(f"tcp://{self._host}")
        if self._line is not None:
            port = await asyncio.to_thread(self._line.lead_to, self._host, port)
        self._address = PeerAddress(peer_id=self._peer_id, endpoint=f"tcp://{self._host}:{port}", epoch=self._epoch)
        self._add_reader(self._listener, self._drain_listener)
        self._add_reader(self._doorkeeper.monitor, self._doorkeeper.watch)
        self._watchdog = asyncio.create_task(self._watch_peers())
        return self._address

    def send(self, destination: str | PeerAddress, message: Message) -> bool:
        """Queue a message; False if the destination is unknown or its queue is full (it is then reported as lost)."""
        frame = encode(message)
        if isinstance(destination, PeerAddress):
            connection = self._connect(destination)
        elif destination in self._inbound:
            return self._send_inbound(destination, frame)
        else:
            known = self._connections.get(destination)
            if known is None:
                return False
            connection = known
        return self._send_on(connection, frame)

    def note_unexpected(self, source: str, message: Message) -> None:
        """A peer sent what nobody here takes: it is logged, however many there are of it in few lines."""
        self._dropped.note(source, f"unexpected {type(message).__name__}")

    def connect(self, address: PeerAddress) -> None:
        """Open a connection if there is none, so that the peer is watched from now on."""
        self._connect(address)

    def disconnect(self, peer_id: str) -> None:
        """Forget a peer without reporting it as lost."""
        self._inbound.pop(peer_id, None)
        connection = self._connections.pop(peer_id, None)
        if connection is not None:
            self._close_connection(connection)

    async def close(self) -> None:
        """Close every socket; queued messages get a moment to leave."""
        self._watchdog.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._loop.remove_reader(self._doorkeeper.monitor.fileno())
        for peer_id in list(self._connections):
            self.disconnect(peer_id)
        self._doorkeeper.close()
        self._listener.close(linger=200)
        self._authenticator.close()
        await asyncio.to_thread(self._context.term)
        if self._line is not None:
            self._line.close()

    # --- sockets

    def _new_socket(self, kind: int) -> _Socket:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = MAX_QUEUED_MESSAGES
        socket.maxmsgsize = MAX_MESSAGE_BYTES
        # Connections to hosts that vanished are closed by the kernel; that a peer is silent is the pings' business.
        # libzmq's own heartbeats are not used: one that is due on a connection that has ended while its queue was full
        # aborts the process (github.com/zeromq/libzmq/issues/4767).
        socket.tcp_keepalive = 1
        socket.tcp_keepalive_idle = math.ceil(self._peer_timeout_s)
        socket.tcp_keepalive_intvl = math.ceil(self._ping_period_s)
        socket.tcp_keepalive_cnt = _KEEPALIVE_PROBES
        socket.tcp_maxrt = int(self._peer_timeout_s * 1000)
        return socket

    def _connect(self, address: PeerAddress) -> _Connection:
        known = self._connections.get(address.peer_id)
        if known is not None and known.address == address:
            return known
        if known is not None:
            self._lose_connection(known, "it has another address or epoch now")
        socket = self._new_socket(zmq.DEALER)
        socket.routing_id = self._peer_id.encode()
        self._key.configure_client(socket)
        monitor = socket.get_monitor_socket(_LOST_EVENTS)
        connection = _Connection(address, socket, monitor, self._lived.now_s)
        self._connections[address.peer_id] = connection
        socket.connect(address.endpoint)
        self._add_reader(socket, self._drain_connection, connection)
        self._add_reader(monitor, self._drain_monitor, connection)
        self._send_on(connection, encode(self._next_ping(connection.number)))
        return connection

    def _add_reader(self, socket: _Socket, drain: Callable[..., None], *args: _Connection) -> None:
        self._loop.add_reader(socket.fileno(), drain, *args)
        # libzmq's descriptor is edge-triggered and may have had its edge while the socket was set up.
        self._loop.call_soon(drain, *args)

    def _close_connection(self, connection: _Connection) -> None:
        self._loop.remove_reader(connection.socket.fileno())
        self._loop.remove_reader(connection.monitor.fileno())
        connection.socket.disable_monitor()
        connection.monitor.close()
        connection.socket.close(linger=200)

    # --- sending

    def _send_on(self, connection: _Connection, frame: bytes) -> bool:
        try:
            connection.socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            self._loop.call_soon(self._lose_connection, connection, "it does not read its messages")
            return False
        # A send may swallow the edge that announces a readable message (libzmq's descriptor is edge-triggered).
        if _has_input(connection.socket):
            self._loop.call_soon(self._drain_connection, connection)
        return True

    def _send_inbound(self, peer_id: str, frame: bytes) -> bool:
        try:
            self._listener.send_multipart((peer_id.encode(), frame), zmq.DONTWAIT)
        except zmq.ZMQError as exc:  # EHOSTUNREACH: gone; EAGAIN: does not read
            self._loop.call_soon(self._lose_inbound, peer_id, str(exc))
            return False
        if _has_input(self._listener):
            self._loop.call_soon(self._drain_listener)
        return True

    # --- receiving

    def _drain_listener(self) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            if self._listener.closed:
                return
            try:
                frames = self._listener.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            if len(frames) != 2:
                self._dropped.note(frames[0].decode(errors="replace"), f"of {len(frames)} frames")
                continue
            self._take_inbound(frames[0].decode(errors="replace"), frames[1])
        self._loop.call_soon(self._drain_listener)

    def _drain_connection(self, connection: _Connection) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            if connection.socket.closed:
                return
            try:
                frame = connection.socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._take(connection, frame)
        self._loop.call_soon(self._drain_connection, connection)

    def _take_inbound(self, source: str, frame: bytes) -> None:
        message = self._decode(source, frame)
        if isinstance(message, Ping):
            peer = self._inbound.get(source)
            if peer is not None and peer.connection not in (None, message.connection):
                self._lose_inbound(source, "it has connected anew")
        peer = self._inbound.get(source)
        if peer is None:
            peer = self._inbound[source] = _Inbound(next(self._sessions), self._lived.now_s)
        peer.heard_at_s = self._lived.now_s
        if isinstance(message, Ping):
            peer.connection = message.connection
            pong = Pong(nonce=message.nonce, epoch=self._epoch, session=peer.session)
            self._send_inbound(source, encode(pong))
        elif message is not None and not isinstance(message, Pong):
            self._on_message(source, message)

    def _take(self, connection: _Connection, frame: bytes) -> None:
        connection.heard_at_s = self._lived.now_s
        source = connection.address.peer_id
        message = self._decode(source, frame)
        if isinstance(message, Ping):
            self._send_on(connection, encode(Pong(nonce=message.nonce, epoch=self._epoch)))
        elif isinstance(message, Pong):
            self._check_pong(connection, message)
        elif message is not None:
            self._on_message(source, message)

    def _check_pong(self, connection: _Connection, pong: Pong) -> None:
        if connection.address.epoch != pong.epoch:
            self._lose_connection(connection, "another incarnation answers at its address")
        elif connection.session is None:
            connection.session = pong.session
        elif connection.session != pong.session:
            self._lose_connection(connection, "it had given this process up")

    def _decode(self, source: str, frame: bytes) -> Message | None:
        try:
            return decode(frame)
        except ProtocolError as exc:
            self._dropped.note(source, str(exc))
            return None

    # --- liveness

    def _drain_monitor(self, connection: _Connection) -> None:
        while not connection.socket.closed:
            try:
                event = recv_monitor_message(connection.monitor, zmq.DONTWAIT)
            except zmq.Again:
                return
            # What the peer sent before it left is still readable and goes first.
            self._drain_connection(connection)
            self._lose_connection(connection, f"its connection ended ({zmq.Event(event['event']).name})")

    def _lose_connection(self, connection: _Connection, why: str) -> None:
        peer_id = connection.address.peer_id
        if self._connections.get(peer_id) is not connection:
            return
        del self._connections[peer_id]
        self._close_connection(connection)
        logger.info("lost %s: %s", peer_id, why)
        self._on_lost(peer_id)

    def _lose_inbound(self, peer_id: str, why: str) -> None:
        if self._inbound.pop(peer_id, None) is not None:
            logger.info("lost %s: %s", peer_id, why)
            self._on_lost(peer_id)

    async def _watch_peers(self) -> None:
        while True:
            await asyncio.sleep(self._ping_period_s)
            oldest_s = self._lived.look() - self._peer_timeout_s
            self._doorkeeper.watch()
            self._dropped.flush()
            for connection in list(self._connections.values()):
                if connection.heard_at_s < oldest_s:
                    self._lose_connection(connection, f"silent for {self._peer_timeout_s} s")
                else:
                    self._send_on(connection, encode(self._next_ping(connection.number)))
            ping = encode(self._next_ping())
            for peer_id, peer in list(self._inbound.items()):
                if peer.heard_at_s < oldest_s:
                    self._lose_inbound(peer_id, f"silent for {self._peer_timeout_s} s")
                else:
                    # One whose connection has ended cannot be reached: that is noticed now, not when it was silent.
                    self._send_inbound(peer_id, ping)

    def _next_ping(self, connection: int = 0) -> Ping:
        self._num_pings += 1
        return Ping(nonce=self._num_pings, connection=connection)


def _has_input(socket: _Socket) -> bool:
    events = socket.get(zmq.EVENTS)
    return isinstance(events, int) and bool(events & zmq.POLLIN)
