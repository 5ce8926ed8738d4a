"""Pulse: who is still there, between hosts. Followers ping over a socket and a thread of their own, rank 0 answers.

A dead host closes no connection, so silence is the only sign that counts everywhere. Threads of their own, because a
rank computes for seconds without looking at its other sockets. What a thread did not live to hear is no silence
(`link.lived_time`): on a machine that is short of processor time all ranks stand still. Knows nothing of plans.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import zmq

from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.lived_time import LivedTime

Context = zmq.Context[zmq.Socket[bytes]]


class PulseServer:
    """Rank 0's end: answers pings and knows which followers have fallen silent. `close` ends the thread; idempotent."""

    def __init__(
        self,
        context: Context,
        key: ClusterKey,
        *,
        host: str,
        silence_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listen on a free port of `host`. A follower is gone after `silence_s` without a ping."""
        self._silence_s = silence_s
        self._lived = LivedTime(silence_s / 10, clock)
        self._heard_at_s: dict[int, float] = {}
        self._is_closed = threading.Event()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        key.configure_server(self._socket)
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.endpoint = f"tcp://{host}:{port}"
        self._thread = threading.Thread(target=self._answer, name="gang-pulse", daemon=True)
        self._thread.start()

    def watch(self, ranks: frozenset[int]) -> None:
        """Expect pings from these followers from now on."""
        self._heard_at_s.update(dict.fromkeys(ranks, self._lived.now_s))

    def silent_ranks(self) -> list[int]:
        """Followers not heard of for too long."""
        oldest_s = self._lived.now_s - self._silence_s
        return [rank for rank, heard_at_s in sorted(self._heard_at_s.items()) if heard_at_s < oldest_s]

    def close(self) -> None:
        """Stop answering."""
        self._is_closed.set()
        self._thread.join()

    def _answer(self) -> None:
        while not self._is_closed.is_set():
            has_ping = self._socket.poll(int(self._silence_s / 20 * 1000))
            self._lived.look()
            if not has_ping:
                continue
            frames = self._socket.recv_multipart()
            rank = int(frames[0])
            if rank in self._heard_at_s:
                self._heard_at_s[rank] = self._lived.now_s
            self._socket.send_multipart(frames)
        self._socket.close()


class PulseClient:
    """A follower's end: pings rank 0 and notices when it falls silent. `close` ends the thread; idempotent."""

    def __init__(
        self,
        context: Context,
        key: ClusterKey,
        *,
        endpoint: str,
        rank: int,
        silence_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ping several times per `silence_s`, after which rank 0 counts as gone."""
        self._silence_s = silence_s
        self._lived = LivedTime(silence_s / 5, clock)
        self._is_closed = False
        self.gone = threading.Event()
        """Set when rank 0 is silent, or this end was closed."""
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.routing_id = str(rank).encode()
        key.configure_client(self._socket)
        self._socket.connect(endpoint)
        self._thread = threading.Thread(target=self._ping, name="gang-pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop pinging."""
        self._is_closed = True
        self.gone.set()
        self._thread.join()

    def _ping(self) -> None:
        period_ms = int(self._silence_s / 10 * 1000)
        heard_at_s = self._lived.now_s
        while not self._is_closed:
            with contextlib.suppress(zmq.Again):  # the silence is noticed below
                self._socket.send(b"", zmq.DONTWAIT)
            if self._socket.poll(period_ms):
                while self._socket.poll(0):
                    self._socket.recv()
                heard_at_s = self._lived.look()
                self.gone.wait(period_ms / 1000)
            if self._lived.look() - heard_at_s > self._silence_s:
                self.gone.set()
                break
        self._socket.close()
