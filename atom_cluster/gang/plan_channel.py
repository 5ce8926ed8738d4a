"""The channel of a gang: step plans from rank 0 to all other ranks, small reports back. Two implementations.

`shm_sender` and `shm_receiver` join the processes of one host, `zmq_channel` those of several; `join.py` picks one per
follower. A frame is opaque bytes here: what it means is in `wire.py`. Knows nothing of Ray, of torch, or of what a step
is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from atom_cluster.errors import GangError


@dataclass(frozen=True, slots=True)
class ReportFrame:
    """Bytes that a follower sent to rank 0."""

    rank: int
    frame: bytes


class PlanSender(Protocol):
    """Rank 0's end, for one or more followers. Used by one thread at a time. Owns sockets and memory."""

    def accept(self, timeout_s: float) -> None:
        """Wait until every follower has connected. Raises `GangError` that names those that have not."""
        ...

    def send(self, frame: bytes) -> None:
        """Deliver a non-empty frame to every follower, in order, waiting while one of them is too far behind.

        Raises `GangError` when a follower is gone or has not made room in time.
        """
        ...

    def take_reports(self) -> list[ReportFrame]:
        """What followers reported since the last call. Never blocks. Raises `GangError` if one is gone, but only once
        everything it had reported was taken."""
        ...

    def close(self) -> None:
        """Hang up; idempotent. Frames already sent are still delivered to followers that live."""
        ...


class PlanReceiver(Protocol):
    """A follower's end. `receive` and `report` are for one thread, `wait_until_gone` is for another one."""

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """Next frame, or None after `timeout_s`. Raises `GangError` when rank 0 is gone and all it sent was read."""
        ...

    def report(self, frame: bytes) -> None:
        """Send a small frame to rank 0. Raises `GangError` when rank 0 is gone or does not take it in time."""
        ...

    def wait_until_gone(self) -> None:
        """Block until rank 0 hung up or died, or this end was closed."""
        ...

    def close(self) -> None:
        """Hang up; idempotent."""
        ...


class FanOut:
    """A `PlanSender` made of several: a gang with followers on this host and on others."""

    def __init__(self, senders: Sequence[PlanSender]) -> None:
        self._senders = tuple(senders)

    def accept(self, timeout_s: float) -> None:
        """See `PlanSender`."""
        for sender in self._senders:
            sender.accept(timeout_s)

    def send(self, frame: bytes) -> None:
        """See `PlanSender`."""
        for sender in self._senders:
            sender.send(frame)

    def take_reports(self) -> list[ReportFrame]:
        """See `PlanSender`."""
        reports: list[ReportFrame] = []
        failure: GangError | None = None
        for sender in self._senders:
            try:
                reports += sender.take_reports()
            except GangError as exc:  # noqa: PERF203 - what the others reported must not be lost
                failure = exc
        if failure is not None and not reports:
            raise failure
        return reports

    def close(self) -> None:
        """See `PlanSender`."""
        for sender in self._senders:
            sender.close()
