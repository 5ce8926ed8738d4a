"""The plan channel between hosts: one authenticated ZMQ connection per follower, and a pulse beside it.

Plans go out and reports come back over the same pair of sockets; every frame is encrypted with a key made for this
gang alone. A follower that does not read is waited for; one that fell silent (`pulse.py`) is gone.
"""

from __future__ import annotations

import os
import struct
import time

import zmq
from msgspec import Struct

from atom_cluster.errors import GangError
from atom_cluster.gang.plan_channel import ReportFrame
from atom_cluster.gang.pulse import Context, PulseClient, PulseServer
from atom_cluster.link.auth import Authenticator, ClusterKey
from atom_cluster.units import Deadline, GiB

SILENCE_S = 5.0
"""Seconds without a sign of life after which the other end counts as gone."""
_MAX_FRAME_BYTES = 1 * GiB
_QUEUED_FRAMES = 16
"""Per connection and direction; one more and the sender waits."""
_RETRY_S = 0.0005
_LINGER_MS = 1000
_WAIT_SLICE_S = 0.1
_NUMBER = struct.Struct("<Q")
"""Goes before each frame: how many were sent before it."""


class ZmqAddress(Struct, frozen=True, kw_only=True):
    """Where followers on other hosts connect, and the gang's own secret. Travels through Ray only."""

    plans: str
    pulse: str
    secret: bytes


class ZmqPlanSender:
    """Rank 0's end; see `plan_channel.PlanSender`. Listens on `host`, an address of this node, and no other."""

    def __init__(
        self, ranks: tuple[int, ...], *, host: str, send_timeout_s: float, silence_s: float = SILENCE_S
    ) -> None:
        self._ranks = ranks
        self._send_timeout_s = send_timeout_s
        self._silence_s = silence_s
        self._num_sent = 0
        self._reports: list[ReportFrame] = []
        secret = os.urandom(32)
        key = ClusterKey.from_secret(secret)
        self._context: Context = zmq.Context()
        self._authenticator = Authenticator(self._context, key)
        self._pulse = PulseServer(self._context, key, host=host, silence_s=silence_s)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.router_mandatory = True
        self._socket.linger = _LINGER_MS
        self._socket.sndhwm = self._socket.rcvhwm = _QUEUED_FRAMES
        self._socket.maxmsgsize = _MAX_FRAME_BYTES
        key.configure_server(self._socket)
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = ZmqAddress(plans=f"tcp://{host}:{port}", pulse=self._pulse.endpoint, secret=secret)
        self._is_closed = False

    def accept(self, timeout_s: float) -> None:
        """See `PlanSender`."""
        deadline = Deadline.after(timeout_s)
        missing = set(self._ranks)
        while missing:
            if not self._socket.poll(int(deadline.remaining_s * 1000)):
                raise GangError(f"ranks {sorted(missing)} did not connect within {timeout_s} s")
            identity, _ = self._socket.recv_multipart()
            missing.discard(int(identity))
            self._socket.send_multipart((identity, b""))
        self._pulse.watch(frozenset(self._ranks))

    def send(self, frame: bytes) -> None:
        """See `PlanSender`."""
        deadline = Deadline.after(self._send_timeout_s)
        for rank in self._ranks:
            while not self._try_send(rank, frame):
                if deadline.has_passed:
                    raise GangError(f"rank {rank} has not read its plans for {self._send_timeout_s} s")
                self._receive_reports()
                self._check_alive()
                time.sleep(_RETRY_S)
        self._num_sent += 1

    def take_reports(self) -> list[ReportFrame]:
        """See `PlanSender`."""
        self._receive_reports()
        reports, self._reports = self._reports, []
        if not reports:
            self._check_alive()
        return reports

    def close(self) -> None:
        """See `PlanSender`."""
        if self._is_closed:
            return
        self._is_closed = True
        self._pulse.close()
        self._socket.close()
        self._authenticator.close()
        self._context.term()

    def _try_send(self, rank: int, frame: bytes) -> bool:
        try:
            self._socket.send_multipart((str(rank).encode(), _NUMBER.pack(self._num_sent), frame), zmq.DONTWAIT)
        except zmq.Again:
            return False
        except zmq.ZMQError as exc:
            raise GangError(f"rank {rank} is gone: {exc}") from exc
        return True

    def _receive_reports(self) -> None:
        while True:
            try:
                identity, frame = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._reports.append(ReportFrame(int(identity), frame))

    def _check_alive(self) -> None:
        silent = self._pulse.silent_ranks()
        if silent:
            raise GangError(f"rank {silent[0]} is gone: nothing was heard of it for {self._silence_s} s")


class ZmqPlanReceiver:
    """A follower's end; see `plan_channel.PlanReceiver`. Made by `connect_zmq`."""

    def __init__(
        self, context: Context, socket: zmq.Socket[bytes], pulse: PulseClient, *, report_timeout_s: float
    ) -> None:
        self._context = context
        self._socket = socket
        self._socket.sndtimeo = int(report_timeout_s * 1000)
        self._report_timeout_s = report_timeout_s
        self._pulse = pulse
        self._num_received = 0
        self._is_closed = False

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """See `PlanReceiver`."""
        deadline = Deadline.after(timeout_s) if timeout_s is not None else None
        while True:
            is_gone = self._pulse.gone.is_set()
            slice_s = _WAIT_SLICE_S if deadline is None else min(_WAIT_SLICE_S, deadline.remaining_s)
            if self._socket.poll(int(slice_s * 1000)):
                return self._next_frame()
            if is_gone:
                raise GangError("rank 0 is gone: nothing was heard of it for too long")
            if deadline is not None and deadline.has_passed:
                return None

    def report(self, frame: bytes) -> None:
        """See `PlanReceiver`."""
        try:
            self._socket.send(frame)
        except zmq.Again as exc:
            raise GangError(f"rank 0 has not read this rank's reports for {self._report_timeout_s} s") from exc

    def wait_until_gone(self) -> None:
        """See `PlanReceiver`."""
        self._pulse.gone.wait()

    def close(self) -> None:
        """See `PlanReceiver`."""
        if self._is_closed:
            return
        self._is_closed = True
        self._pulse.close()
        self._socket.close()
        self._context.term()

    def _next_frame(self) -> bytes:
        number, frame = self._socket.recv_multipart()
        if _NUMBER.unpack(number) != (self._num_received,):
            # ZMQ reconnects by itself after a network failure, and drops what was under way.
            raise GangError(f"frame {self._num_received} from rank 0 was lost on the way")
        self._num_received += 1
        return frame


def connect_zmq(
    address: ZmqAddress, *, rank: int, timeout_s: float, report_timeout_s: float = 30.0, silence_s: float = SILENCE_S
) -> ZmqPlanReceiver:
    """Join rank 0's channel. Raises `GangError` when rank 0 does not answer in time."""
    key = ClusterKey.from_secret(address.secret)
    context: Context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = _LINGER_MS
    socket.sndhwm = socket.rcvhwm = _QUEUED_FRAMES
    socket.maxmsgsize = _MAX_FRAME_BYTES
    socket.routing_id = str(rank).encode()
    key.configure_client(socket)
    socket.connect(address.plans)
    socket.send(b"")
    if not socket.poll(int(timeout_s * 1000)):
        socket.close(linger=0)
        context.term()
        raise GangError(f"rank {rank} cannot reach rank 0 at {address.plans} within {timeout_s} s")
    socket.recv()
    pulse = PulseClient(context, key, endpoint=address.pulse, rank=rank, silence_s=silence_s)
    return ZmqPlanReceiver(context, socket, pulse, report_timeout_s=report_timeout_s)
