"""Follower: the loop of every rank but the first. Executes rank 0's plans in order and reports what ended.

Knows no Ray and no sockets; ends with the gang's dismissal, with an error of its own, or because rank 0 is gone.
"""

from __future__ import annotations

from collections import deque

from atom_cluster.gang import wire
from atom_cluster.gang.plan_channel import PlanReceiver
from atom_cluster.gang.rank_runner import Launched, RankRunner
from atom_cluster.gang.step_clock import StepClock
from atom_cluster.messages.grammars import CompileGrammar
from atom_cluster.messages.profile import OpenWindow
from atom_cluster.messages.steps import StepPlan
from atom_cluster.messages.transfer import ReadBlocks, TagBlocks

EXIT_LEADERLESS = 70
"""Exit status of a follower whose rank 0 is gone."""
LEAVE_S = 2.0
"""How long a follower may take to end by itself after rank 0 hung up."""

_KV_POLL_S = 0.001
_LOOK_S = 0.1
"""How often a device that still computes is looked at: after an error there, rank 0 waits for this one in vain, and so
sends no plan that would show it."""
_MAX_LAUNCHED = 2


class Follower:
    """One follower. Borrows runner and receiver: whoever made them closes them."""

    def __init__(self, runner: RankRunner, receiver: PlanReceiver, clock: StepClock) -> None:
        self._runner = runner
        self._receiver = receiver
        self._clock = clock
        self._launched: deque[Launched] = deque()
        self._num_open_commands = 0

    def run(self) -> None:
        """Work until dismissed. Raises `GangError` when rank 0 is gone, and whatever a step raised."""
        while True:
            frame = self._receiver.receive(self._patience())
            if frame is not None:
                message = wire.decode_to_follower(frame)
                if isinstance(message, wire.Dismiss):
                    return
                self._execute(message.plan)
            while self._launched and self._launched[0].is_done():
                self._launched.popleft()
            if self._num_open_commands:
                self._report_kv()

    def _patience(self) -> float | None:
        """How long to wait for the next plan before there is something else to look at."""
        if self._num_open_commands:
            return _KV_POLL_S
        return _LOOK_S if self._launched else None

    def _execute(self, plan: StepPlan) -> None:
        self._clock.begin(plan.step_id)
        self._launched.append(self._runner.launch(plan))
        # On a GPU the work may still be running: the next plan's is issued behind it, but not any number of them.
        if len(self._launched) > _MAX_LAUNCHED:
            self._launched.popleft().wait()
        self._clock.end()
        self._num_open_commands += sum(isinstance(command, (TagBlocks, ReadBlocks)) for command in plan.kv)
        self._num_open_commands += isinstance(plan.profile, OpenWindow)
        self._num_open_commands += sum(isinstance(command, CompileGrammar) for command in plan.grammars)

    def _report_kv(self) -> None:
        reports = tuple(self._runner.poll_kv())
        if reports:
            self._num_open_commands -= len(reports)
            self._receiver.report(wire.encode(wire.RankReports(reports)))
