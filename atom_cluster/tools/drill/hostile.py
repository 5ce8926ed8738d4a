"""What somebody on the network can do to our listeners without the secret, or to a member's bytes on the way.

Each attack returns how often it was tried. None waits for an answer: whether it did harm is seen by the clients that
ask meanwhile, and by the processes' descriptors, memory and logs afterwards.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import zmq

from atom_cluster.kv_transfer import tcp_wire
from atom_cluster.link.auth import HANDSHAKE_S, ClusterKey
from atom_cluster.link.codec import MAX_MESSAGE_BYTES, encode
from atom_cluster.messages.requests import CancelRequest
from atom_cluster.tools.drill.listeners import Listener

NUM_SILENT = 300
"""Connections per listener that say nothing: more than an endpoint lets stand in its door."""
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
"""How a ZMQ client with CURVE begins."""
_SECRET_OF_NOBODY = secrets.token_bytes(32)
_TIMEOUT_S = 5.0
_SETTLE_S = 0.3

Attack = Callable[[Listener, bytes], int]


def noise(listener: Listener, secret: bytes) -> int:
    """Random bytes, some behind a right beginning."""
    numbers = random.Random(listener.port)
    beginnings = (b"", _GREETING, tcp_wire.MAGIC)
    for attempt in range(60):
        with _stranger(listener) as sock:
            sock.sendall(beginnings[attempt % 3] + numbers.randbytes(numbers.randrange(1, 5000)))
    return 60


def halves(listener: Listener, secret: bytes) -> int:
    """A right beginning that is left in the middle."""
    beginning = _GREETING if listener.kind == "link" else secrets.token_bytes(tcp_wire.CLIENT_PROOF_BYTES)
    for length in range(1, len(beginning), 3):
        with _stranger(listener) as sock:
            sock.sendall(beginning[:length])
    return len(range(1, len(beginning), 3))


def oversized(listener: Listener, secret: bytes) -> int:
    """Frames that claim to be enormous, from a stranger; and one over the limit, from a member."""
    for size in (1 << 62, (1 << 64) - 1, MAX_MESSAGE_BYTES + 1):
        with _stranger(listener) as sock:
            sock.sendall(_GREETING + b"\x06" + size.to_bytes(8, "big") + bytes(100_000))
    if listener.kind != "link":
        return 3
    with _member(ClusterKey.from_secret(secret), listener.host, listener.port) as member:
        member.send(bytes(MAX_MESSAGE_BYTES + 1))
        time.sleep(_SETTLE_S)
    return 4


def wrong_secret(listener: Listener, secret: bytes) -> int:
    """Everything right but the secret."""
    if listener.kind == "kv over tcp":
        for _ in range(5):
            with _stranger(listener) as sock:
                hello = sock.recv(tcp_wire.HELLO_BYTES, socket.MSG_WAITALL)
                key = tcp_wire.WireKey(_SECRET_OF_NOBODY)
                sock.sendall(key.client_proof(secrets.token_bytes(16), hello, tcp_wire.make_nonce()))
                sock.recv(1)
        return 5
    for _ in range(5):
        with _member(ClusterKey.from_secret(_SECRET_OF_NOBODY), listener.host, listener.port) as stranger:
            stranger.send(encode(CancelRequest("everything")))
            time.sleep(_SETTLE_S / 3)
    return 5


def members_nonsense(listener: Listener, secret: bytes) -> int:
    """Messages from somebody with the secret that mean nothing, or not to this process."""
    if listener.kind != "link":
        return 0
    numbers = random.Random(listener.port)
    with _member(ClusterKey.from_secret(secret), listener.host, listener.port) as member:
        for _ in range(200):
            member.send(numbers.randbytes(numbers.randrange(1, 300)))
        member.send(encode(CancelRequest("nobody's request")))
        time.sleep(_SETTLE_S)
    return 201


def flipped(listener: Listener, secret: bytes) -> int:
    """A member's messages through a line that flips one bit of one byte, from the greeting to the messages."""
    if listener.kind != "link":
        return 0
    positions = [*range(0, 900, 15)]
    for position in positions:
        with (
            _flipping_line(listener, position) as port,
            _member(ClusterKey.from_secret(secret), "127.0.0.1", port) as member,
        ):
            for number in range(5):
                member.send(encode(CancelRequest(f"nobody's request {number}")))
            time.sleep(0.05)
    return len(positions)


def silence(listener: Listener, secret: bytes) -> int:
    """Hundreds of connections that say nothing, for as long as they are let."""
    with contextlib.ExitStack() as crowd:
        for _ in range(NUM_SILENT):
            crowd.enter_context(_stranger(listener))
        time.sleep(HANDSHAKE_S + 1.0)
    return NUM_SILENT


ATTACKS: tuple[Attack, ...] = (noise, halves, oversized, wrong_secret, members_nonsense, flipped, silence)


@contextlib.contextmanager
def _stranger(listener: Listener) -> Iterator[socket.socket]:
    """A connection. That it is refused, at any moment, is what is expected."""
    try:
        sock = socket.create_connection((listener.host, listener.port), _TIMEOUT_S)
    except OSError:
        sock, other = socket.socketpair()
        other.close()
    with sock, contextlib.suppress(OSError):
        yield sock


@contextlib.contextmanager
def _member(key: ClusterKey, host: str, port: int) -> Iterator[zmq.Socket[bytes]]:
    """A ZMQ client that does not try again."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.linger = 0
    sock.reconnect_ivl = -1
    key.configure_client(sock)
    sock.connect(f"tcp://{host}:{port}")
    try:
        yield sock
    finally:
        sock.close()
        context.term()


@contextlib.contextmanager
def _flipping_line(listener: Listener, position: int) -> Iterator[int]:
    """The port of a line to the listener that flips a bit of the client's byte at a position."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_TIMEOUT_S)
        line = threading.Thread(target=_relay, args=(server, listener, position), daemon=True)
        line.start()
        yield int(server.getsockname()[1])
    line.join(_TIMEOUT_S)


def _relay(server: socket.socket, listener: Listener, position: int) -> None:
    with contextlib.suppress(OSError):
        client, _ = server.accept()
        with client, socket.create_connection((listener.host, listener.port), _TIMEOUT_S) as target:
            done = 0
            while True:
                readable, _, _ = select.select([client, target], [], [], _TIMEOUT_S)
                if not readable:
                    return
                for end in readable:
                    data = bytearray(end.recv(4096))
                    if not data:
                        return
                    if end is client:
                        if done <= position < done + len(data):
                            data[position - done] ^= 0x10
                        done += len(data)
                    (target if end is client else client).sendall(data)
