"""A non-blocking socket driven by a session, and the thread that looks after many of them.

A session is a generator: it yields a memoryview when it wants that view filled with the next bytes from the socket, and
None when it wants to go on only after everything it queued has been sent. So a protocol reads like straight code, and
no thread ever blocks on one peer. Knows nothing of frames, blocks or secrets.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator

from atom_cluster.errors import ProtocolError, TransferError
from atom_cluster.units import MiB

Session = Generator["memoryview | None", None, None]

_log = logging.getLogger(__name__)

_TURN_BYTES = 4 * MiB
"""Received from one socket before the others get their turn."""
_MAX_BUFFERS_PER_SEND = 64
_DEAD_PEER_MS = 20_000
_ACCEPT_RETRY_S = 0.05


class Channel:
    """One connected, or connecting, socket. Owns it. Used by one thread only."""

    def __init__(self, sock: socket.socket, *, is_connecting: bool = False) -> None:
        """`sock` must be non-blocking; `run` must be called before anything else."""
        self._sock = sock
        self._is_connecting = is_connecting
        self._session: Session | None = None
        self._target: memoryview | None = None
        self._outgoing: deque[memoryview] = deque()
        self.last_progress_s = time.monotonic()
        """When bytes last went in or out."""
        if not is_connecting:
            _tune(sock)

    def run(self, session: Session) -> None:
        """Start the session. Raises what the session raises."""
        self._session = session
        if not self._is_connecting:
            self._advance()

    def send(self, *buffers: bytes | memoryview) -> None:
        """Queue bytes; their memory is read when the socket takes them."""
        self._outgoing.extend(memoryview(buffer) for buffer in buffers if len(buffer))

    def divert(self, scratch: memoryview) -> None:
        """Fill `scratch` with what is still to come for the view being filled, so that its memory is not touched again.

        `scratch` must be as long as any view of the session.
        """
        if self._target is not None:
            self._target = scratch[: len(self._target)]

    def fileno(self) -> int:
        """For selectors."""
        return self._sock.fileno()

    @property
    def events(self) -> int:
        """What to wait for: `selectors.EVENT_*`."""
        if self._is_connecting:
            return selectors.EVENT_WRITE
        events = selectors.EVENT_READ if self._target is not None else 0
        return events | (selectors.EVENT_WRITE if self._outgoing else 0)

    @property
    def has_outgoing(self) -> bool:
        """Whether bytes wait to be sent."""
        return bool(self._outgoing)

    def handle(self, events: int) -> None:
        """Do what the socket is ready for. Raises `OSError` or `ProtocolError` when the connection is over."""
        if self._is_connecting:
            self._finish_connecting()
            return
        if events & selectors.EVENT_WRITE:
            self._write()
        if events & selectors.EVENT_READ:
            self._read()

    def close(self) -> None:
        """Close the socket; the session does not run again. Idempotent."""
        if self._session is not None:
            self._session.close()
        self._target = None
        self._outgoing.clear()
        self._sock.close()

    def _finish_connecting(self) -> None:
        error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise ConnectionError(error, os.strerror(error))
        self._is_connecting = False
        self.last_progress_s = time.monotonic()
        _tune(self._sock)
        self._advance()

    def _read(self) -> None:
        budget = _TURN_BYTES
        while self._target is not None and budget > 0:
            try:
                num_bytes = self._sock.recv_into(self._target)
            except (BlockingIOError, InterruptedError):
                return
            if num_bytes == 0:
                raise ConnectionResetError("the connection was closed by the peer")
            self.last_progress_s = time.monotonic()
            budget -= num_bytes
            self._target = self._target[num_bytes:]
            if not self._target:
                self._advance()

    def _write(self) -> None:
        buffers = [self._outgoing[i] for i in range(min(len(self._outgoing), _MAX_BUFFERS_PER_SEND))]
        try:
            num_bytes = self._sock.sendmsg(buffers)
        except (BlockingIOError, InterruptedError):
            return
        self.last_progress_s = time.monotonic()
        while num_bytes:
            first = self._outgoing.popleft()
            if num_bytes < len(first):
                self._outgoing.appendleft(first[num_bytes:])
            num_bytes -= min(num_bytes, len(first))
        if not self._outgoing and self._target is None:
            self._advance()

    def _advance(self) -> None:
        """Let the session run until it has to wait for bytes or for the outgoing ones to be gone."""
        assert self._session is not None, "run() starts the session"
        self._target = None
        for want in self._session:
            if want is None and self._outgoing:
                return
            if want:
                self._target = want
                return
        raise ConnectionResetError("the session ended")


class ChannelLoop:
    """A thread that serves channels, and whatever else its owner asks of it. Owns the thread and all its channels."""

    def __init__(self, name: str, *, on_tick: Callable[[], float | None]) -> None:
        """`on_tick` runs in the thread every round and returns the most seconds until the next one (None: no limit)."""
        self._on_tick = on_tick
        self._calls: deque[Callable[[], None]] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.settimeout(0.0)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._channels: dict[Channel, Callable[[str], None]] = {}
        self._listeners: dict[socket.socket, Callable[[socket.socket], None]] = {}
        self._failure: Exception | None = None
        self._is_closing = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` soon in the thread. Raises `TransferError` if the thread has failed; ignored after `close`."""
        self.check_alive()
        self._calls.append(function)
        self._wake()

    def check_alive(self) -> None:
        """Raise `TransferError` if the thread has failed."""
        if self._failure is not None:
            raise TransferError(f"{self._thread.name} failed: {self._failure}") from self._failure

    def close(self) -> None:
        """Stop the thread and close every channel, in silence. Idempotent; not to be called from the thread."""
        self._is_closing = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._wake_in.close()
            self._wake_out.close()

    # --- in the thread ----------------------------------------------------------------------------------------------

    def listen(self, sock: socket.socket, on_accept: Callable[[socket.socket], None]) -> None:
        """Take over a listening socket; `on_accept` gets every new connection, non-blocking, and owns it."""
        sock.settimeout(0.0)
        self._listeners[sock] = on_accept
        self._selector.register(sock, selectors.EVENT_READ, sock)

    def add(self, channel: Channel, session: Session, on_end: Callable[[str], None]) -> None:
        """Take over a channel and start its session; `on_end` is called once, with the reason, unless we discard it."""
        self._channels[channel] = on_end
        self._selector.register(channel, selectors.EVENT_WRITE, channel)
        self._guard(channel, lambda: channel.run(session))

    def discard(self, channel: Channel) -> None:
        """Close a channel on our own account. Idempotent."""
        if self._channels.pop(channel, None) is not None:
            self._selector.unregister(channel)
            channel.close()

    def send(self, channel: Channel, *buffers: bytes | memoryview) -> None:
        """Send on a channel outside of its session."""
        if channel in self._channels:
            channel.send(*buffers)
            self._selector.modify(channel, channel.events, channel)

    def _main(self) -> None:
        """Supervisor of the thread: a failure is logged here and raised again to the owner by `check_alive`."""
        try:
            while not self._is_closing:
                while self._calls:
                    self._calls.popleft()()
                timeout_s = self._on_tick()
                for key, events in self._selector.select(timeout_s):
                    self._dispatch(key.data, events)
        except Exception as exc:  # noqa: BLE001 a supervisor
            _log.exception("%s failed", self._thread.name)
            self._failure = exc
        finally:
            for channel in tuple(self._channels):
                self.discard(channel)
            for sock in self._listeners:
                sock.close()
            self._selector.close()

    def _dispatch(self, ready: Channel | socket.socket | None, events: int) -> None:
        if ready is None:
            self._wake_in.recv(4096)
        elif isinstance(ready, Channel):
            if ready in self._channels:
                self._guard(ready, lambda: ready.handle(events))
        else:
            self._accept(ready)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as exc:
            _log.warning("cannot accept a connection: %s", exc)
            time.sleep(_ACCEPT_RETRY_S)  # out of descriptors, most likely: the listener stays readable
            return
        sock.settimeout(0.0)
        self._listeners[listener](sock)

    def _guard(self, channel: Channel, action: Callable[[], None]) -> None:
        """Run a channel's action; end the channel if that fails."""
        try:
            action()
        except (OSError, ProtocolError, TransferError) as exc:
            on_end = self._channels.get(channel)
            self.discard(channel)
            if on_end is not None:
                on_end(str(exc))
            return
        if channel in self._channels:
            self._selector.modify(channel, channel.events, channel)

    def _wake(self) -> None:
        with self._lock:
            if self._wake_out.fileno() >= 0:
                try:
                    self._wake_out.send(b"x")
                except BlockingIOError:
                    return  # full of wake-ups already


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Data or keepalives unacknowledged for this long mean that the peer's host is gone. Linux only.
    for option, value in (("TCP_KEEPIDLE", _DEAD_PEER_MS // 2000), ("TCP_USER_TIMEOUT", _DEAD_PEER_MS)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
