"""A follower's end of the plan channel between processes of one host; see `shm_sender.py`."""

from __future__ import annotations

import contextlib
import os
import select
import socket

from atom_cluster.errors import GangError
from atom_cluster.gang.ring import Ring
from atom_cluster.gang.shm_wire import (
    ACKNOWLEDGEMENT,
    HELLO,
    IS_ACKNOWLEDGEMENT,
    IS_REPORT,
    READ_BYTES,
    RECORD,
    UPSTREAM,
    WELCOME,
    ShmAddress,
    wait_for_events,
)
from atom_cluster.units import Deadline


class ShmPlanReceiver:
    """A follower's end; see `plan_channel.PlanReceiver`. Made by `connect_shm`."""

    def __init__(self, connection: socket.socket, ring: Ring, *, report_timeout_s: float) -> None:
        self._socket = connection
        self._ring = ring
        self._report_timeout_s = report_timeout_s
        self._position = 0
        self._acknowledged = 0
        self._unparsed = bytearray()
        self._fragments: list[bytes] = []
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """See `PlanReceiver`."""
        deadline = None if timeout_s is None else Deadline.after(timeout_s)
        while True:
            frame = self._next_frame()
            if frame is not None:
                return frame
            if not self._poll.poll(None if deadline is None else deadline.remaining_s * 1000):
                return None
            try:
                data = self._socket.recv(READ_BYTES)
            except OSError as exc:
                raise GangError(f"rank 0 is gone: {exc.strerror}") from exc
            if not data:
                raise GangError("rank 0 is gone: its process ended or hung up")
            self._unparsed += data

    def report(self, frame: bytes) -> None:
        """See `PlanReceiver`."""
        self._send(UPSTREAM.pack(len(frame), IS_REPORT) + frame)

    def wait_until_gone(self) -> None:
        """See `PlanReceiver`."""
        # Asking for POLLRDHUP alone, the wait is not ended by data. Closing this end shuts the socket down first.
        wait_for_events(self._socket, select.POLLRDHUP, None)

    def close(self) -> None:
        """See `PlanReceiver`."""
        with contextlib.suppress(OSError):  # rank 0 was faster, or this end is closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._ring.close()

    def _next_frame(self) -> bytes | None:
        """Read fragments that have been announced, up to the end of a frame."""
        while len(self._unparsed) >= RECORD.size:
            num_bytes, is_last = RECORD.unpack_from(self._unparsed)
            del self._unparsed[: RECORD.size]
            self._fragments.append(self._ring.read(self._position, num_bytes))
            self._position += num_bytes
            # Few acknowledgements are enough: rank 0 looks at them only when the ring is full.
            if self._position - self._acknowledged >= self._ring.num_bytes // 4:
                self._acknowledged = self._position
                self._send(
                    UPSTREAM.pack(ACKNOWLEDGEMENT.size, IS_ACKNOWLEDGEMENT) + ACKNOWLEDGEMENT.pack(self._position)
                )
            if is_last:
                frame = b"".join(self._fragments)
                self._fragments.clear()
                return frame
        return None

    def _send(self, data: bytes) -> None:
        deadline = Deadline.after(self._report_timeout_s)
        unsent = memoryview(data)
        while unsent:
            if not wait_for_events(self._socket, select.POLLOUT, deadline.remaining_s):
                raise GangError(f"rank 0 has not read this rank's reports for {self._report_timeout_s} s")
            try:
                unsent = unsent[self._socket.send(unsent) :]
            except BlockingIOError:
                continue
            except OSError as exc:
                raise GangError(f"rank 0 is gone: {exc.strerror}") from exc


def connect_shm(address: ShmAddress, *, rank: int, timeout_s: float, report_timeout_s: float = 30.0) -> ShmPlanReceiver:
    """Join rank 0's channel. Raises `GangError` when rank 0 is not there or refuses."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(address.name)
        connection.sendall(HELLO.pack(rank, address.token))
        welcome, descriptors, _, _ = socket.recv_fds(connection, WELCOME.size, maxfds=1)
    except OSError as exc:
        connection.close()
        raise GangError(f"rank {rank} cannot reach rank 0: {exc}") from exc
    if len(welcome) != WELCOME.size or len(descriptors) != 1:
        connection.close()
        raise GangError(f"rank 0 turned rank {rank} away")
    (num_bytes,) = WELCOME.unpack(welcome)
    try:
        ring = Ring(descriptors[0], num_bytes, is_writable=False)
    finally:
        os.close(descriptors[0])
    connection.settimeout(0)
    return ShmPlanReceiver(connection, ring, report_timeout_s=report_timeout_s)
