"""The plan channel between processes of one host: frames in shared memory, a Unix socket per follower beside it.

Rank 0 writes a frame once, however many followers there are, and sends each of them a small record that says so. The
follower sleeps in the kernel until then. The same socket carries acknowledgements (which free room in the ring) and
reports back, hands over the memory's descriptor at the start, and tells each end at once when the other one dies.

The listening socket has an abstract random name: nothing is left in a file system. A follower proves itself with a
token that it got from rank 0 through the gang's head, and must belong to the same user. Linux only.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import struct
from dataclasses import dataclass, field

from atom_cluster.errors import GangError
from atom_cluster.gang.plan_channel import ReportFrame
from atom_cluster.gang.ring import Ring, create_memory_file
from atom_cluster.gang.shm_wire import (
    ACKNOWLEDGEMENT,
    HELLO,
    IS_REPORT,
    READ_BYTES,
    RECORD,
    TOKEN_BYTES,
    UPSTREAM,
    WELCOME,
    ShmAddress,
    wait_for_events,
)
from atom_cluster.units import Deadline, MiB

RING_BYTES = 4 * MiB
_PEER_CREDENTIALS = struct.Struct("3i")
_WAIT_SLICE_S = 0.02


@dataclass(slots=True)
class _Follower:
    """Rank 0's view of one follower."""

    rank: int
    socket: socket.socket
    acknowledged: int = 0
    unparsed: bytearray = field(default_factory=bytearray)
    is_gone: bool = False


class ShmPlanSender:
    """Rank 0's end; see `plan_channel.PlanSender`. `send_timeout_s` bounds the wait for a follower to make room."""

    def __init__(self, ranks: tuple[int, ...], *, send_timeout_s: float, ring_bytes: int = RING_BYTES) -> None:
        self._missing = set(ranks)
        self._send_timeout_s = send_timeout_s
        self._written = 0
        self._followers: list[_Follower] = []
        self._reports: list[ReportFrame] = []
        self._memory_fd = create_memory_file(ring_bytes)
        self._ring = Ring(self._memory_fd, ring_bytes, is_writable=True)
        self.address = ShmAddress(
            name=b"\0atom_cluster/" + secrets.token_hex(16).encode(), token=os.urandom(TOKEN_BYTES)
        )
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.address.name)
        self._listener.listen(len(ranks))
        self._is_closed = False

    def accept(self, timeout_s: float) -> None:
        """See `PlanSender`. Strangers are turned away and do not count."""
        deadline = Deadline.after(timeout_s)
        while self._missing:
            if not wait_for_events(self._listener, select.POLLIN, deadline.remaining_s):
                raise GangError(f"ranks {sorted(self._missing)} did not connect within {timeout_s} s")
            connection, _ = self._listener.accept()
            rank = self._greet(connection)
            if rank is None:
                connection.close()
                continue
            connection.settimeout(0)
            self._missing.discard(rank)
            self._followers.append(_Follower(rank, connection))
        self._listener.close()

    def send(self, frame: bytes) -> None:
        """See `PlanSender`. Frames of any size pass, in fragments if need be."""
        deadline = Deadline.after(self._send_timeout_s)
        view = memoryview(frame)
        fragment_bytes = self._ring.num_bytes // 4
        for start in range(0, len(view), fragment_bytes):
            fragment = view[start : start + fragment_bytes]
            self._wait_for_room(len(fragment), deadline)
            self._ring.write(self._written, fragment)
            self._written += len(fragment)
            record = RECORD.pack(len(fragment), start + len(fragment) == len(view))
            for follower in self._followers:
                self._notify(follower, record, deadline)

    def take_reports(self) -> list[ReportFrame]:
        """See `PlanSender`."""
        for follower in self._followers:
            self._drain(follower)
        reports, self._reports = self._reports, []
        if not reports:
            self._check_alive()
        return reports

    def close(self) -> None:
        """See `PlanSender`."""
        if self._is_closed:
            return
        self._is_closed = True
        self._listener.close()
        for follower in self._followers:
            follower.socket.close()
        self._ring.close()
        os.close(self._memory_fd)

    def _greet(self, connection: socket.socket) -> int | None:
        """Check who connected and hand over the memory; the follower's rank, or None for a stranger."""
        connection.settimeout(1.0)
        try:
            hello = _receive_exactly(connection, HELLO.size)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
            rank, token = HELLO.unpack(hello)
            _, user_id, _ = _PEER_CREDENTIALS.unpack(credentials)
            is_known = secrets.compare_digest(token, self.address.token) and user_id == os.getuid()
            if not is_known or rank not in self._missing:
                return None
            socket.send_fds(connection, [WELCOME.pack(self._ring.num_bytes)], [self._memory_fd])
        except (OSError, EOFError):
            return None
        return int(rank)

    def _wait_for_room(self, num_bytes: int, deadline: Deadline) -> None:
        limit = self._written + num_bytes - self._ring.num_bytes
        while True:
            slow = [follower for follower in self._followers if follower.acknowledged < limit]
            if not slow:
                return
            self._wait_for(slow[0], select.POLLIN, deadline)

    def _notify(self, follower: _Follower, record: bytes, deadline: Deadline) -> None:
        unsent = memoryview(record)
        while unsent:
            try:
                unsent = unsent[follower.socket.send(unsent) :]
            except BlockingIOError:  # noqa: PERF203 - the usual record goes out at the first try
                self._wait_for(follower, select.POLLIN | select.POLLOUT, deadline)
            except OSError as exc:
                follower.is_gone = True
                raise GangError(f"rank {follower.rank} is gone: {exc.strerror}") from exc

    def _wait_for(self, follower: _Follower, events: int, deadline: Deadline) -> None:
        """Wait a little for a slow follower. All reports are read meanwhile, or both ends could wait forever."""
        if deadline.has_passed:
            raise GangError(f"rank {follower.rank} has not read its plans for {self._send_timeout_s} s")
        wait_for_events(follower.socket, events, min(_WAIT_SLICE_S, deadline.remaining_s))
        for each in self._followers:
            self._drain(each)
        self._check_alive()

    def _drain(self, follower: _Follower) -> None:
        while not follower.is_gone:
            try:
                data = follower.socket.recv(READ_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            follower.is_gone = not data
            follower.unparsed += data
        self._parse(follower)

    def _parse(self, follower: _Follower) -> None:
        buffer = follower.unparsed
        start = 0
        while len(buffer) - start >= UPSTREAM.size:
            num_bytes, kind = UPSTREAM.unpack_from(buffer, start)
            end = start + UPSTREAM.size + num_bytes
            if end > len(buffer):
                break
            payload = bytes(buffer[start + UPSTREAM.size : end])
            if kind == IS_REPORT:
                self._reports.append(ReportFrame(follower.rank, payload))
            else:
                (follower.acknowledged,) = ACKNOWLEDGEMENT.unpack(payload)
            start = end
        del buffer[:start]

    def _check_alive(self) -> None:
        gone = [follower.rank for follower in self._followers if follower.is_gone]
        if gone:
            raise GangError(f"rank {gone[0]} is gone: its process ended or hung up")


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = connection.recv(num_bytes - len(data))
        if not part:
            raise EOFError
        data += part
    return data
