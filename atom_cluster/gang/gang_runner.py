"""Stop 9 of 14: GangRunner, the StepRunner of several ranks. Each plan goes to all; rank 0 runs in this process.

All or none: a follower's error or death is raised by `collect`, and the gang is then of no more use. Next stop:
runner/model_runner.py. Knows no Ray and no sockets.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NoReturn

from atom_cluster.engine.protocols import RunnerInfo, StepRunner
from atom_cluster.errors import AtomClusterError, GangError
from atom_cluster.gang import wire
from atom_cluster.gang.plan_channel import PlanSender
from atom_cluster.kv_transfer.combine import ReportCombiner
from atom_cluster.messages.steps import StepPlan, StepResult
from atom_cluster.messages.transfer import RankReport, Report
from atom_cluster.units import Deadline

_log = logging.getLogger(__name__)

_CHECK_S = 0.05
"""How often the followers are looked at while a step is running."""
_EXPLAIN_S = 2.0
"""How long a failed step waits for a follower's own account of what happened."""
_CLOSE_S = 5.0


class GangRunner:
    """See `engine.protocols.StepRunner`. Owns the local runner and the sender."""

    def __init__(
        self,
        *,
        info: RunnerInfo,
        local: StepRunner,
        poll_local_kv: Callable[[], list[RankReport]],
        sender: PlanSender,
    ) -> None:
        """`info` describes the whole gang; `poll_local_kv` gives rank 0's own reports, not yet combined."""
        self._info = info
        self._local = local
        self._poll_local_kv = poll_local_kv
        self._sender = sender
        self._combiner = ReportCombiner(info.world_size)
        self._combined: list[Report] = []
        self._failure: Exception | None = None
        self._is_closed = False

    @property
    def info(self) -> RunnerInfo:
        """Constant over the runner's life."""
        return self._info

    def submit(self, plan: StepPlan) -> None:
        """Send the plan to all ranks. Raises `GangError` when a follower cannot take it."""
        self._check_usable()
        try:
            self._sender.send(wire.encode(wire.Execute(plan)))
        except GangError as exc:
            self._fail(exc)
        self._local.submit(plan)

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """The oldest result, which rank 0 has. Raises `GangError` within seconds of any rank's failure."""
        self._check_usable()
        deadline = None if timeout_s is None else Deadline.after(timeout_s)
        while True:
            self._read_followers()
            wait_s = _CHECK_S if deadline is None else min(_CHECK_S, deadline.remaining_s)
            try:
                result = self._local.collect(wait_s)
            except Exception as exc:  # noqa: BLE001 - raised again, after asking the followers for the reason
                self._explain(exc)
            if result is not None or (deadline is not None and deadline.has_passed):
                return result

    def poll_kv(self) -> list[Report]:
        """Reports of KV commands, profiler windows and compilations of grammars that ended on every rank since the
        last call."""
        self._check_usable()
        self._read_followers()
        self._combine(self._poll_local_kv())
        combined, self._combined = self._combined, []
        return combined

    def close(self) -> None:
        """Dismiss the followers and release rank 0. Idempotent; never waits long for a rank that is stuck."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._failure is None:
            try:
                self._sender.send(wire.encode(wire.Dismiss()))
            except GangError as exc:
                _log.warning("a follower was gone before it was dismissed: %s", exc)
        # A collective whose other end is gone may never return; the head ends this process then.
        closing = threading.Thread(target=self._local.close, name="close-rank-0", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)
        self._sender.close()

    def _read_followers(self) -> None:
        try:
            frames = self._sender.take_reports()
        except GangError as exc:
            self._fail(exc)
        for each in frames:
            message = wire.decode_from_follower(each.frame)
            if isinstance(message, wire.RankFailed):
                self._fail(GangError(f"rank {each.rank} failed: {message.message}"))
            self._combine(message.reports)

    def _combine(self, reports: list[RankReport] | tuple[RankReport, ...]) -> None:
        for report in reports:
            combined = self._combiner.add(report)
            if combined is not None:
                self._combined.append(combined)

    def _explain(self, exc: Exception) -> NoReturn:
        """Rank 0's step failed, maybe only because another rank did: prefer that rank's account."""
        deadline = Deadline.after(_EXPLAIN_S)
        pause = threading.Event()
        while not deadline.has_passed:
            try:
                self._read_followers()
            except GangError as cause:
                raise cause from exc
            pause.wait(_CHECK_S)
        self._failure = exc
        raise exc

    def _fail(self, exc: GangError) -> NoReturn:
        self._failure = exc
        raise exc

    def _check_usable(self) -> None:
        if self._is_closed:
            raise AtomClusterError("the gang is closed")
        if self._failure is not None:
            raise GangError(f"the gang failed before: {self._failure}") from self._failure
