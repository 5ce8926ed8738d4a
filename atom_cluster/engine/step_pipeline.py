"""StepPipeline: the plans that a runner has and whose results are not in yet. Knows no requests and no policy.

With two in flight the runner always has the next plan when it finishes one.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass

from atom_cluster.engine.protocols import StepRunner
from atom_cluster.engine.scheduler import ScheduledRow, ScheduledStep
from atom_cluster.engine.step_meter import StepMeter
from atom_cluster.messages.grammars import GrammarCommand
from atom_cluster.messages.profile import WindowCommand
from atom_cluster.messages.steps import RowStep, StepPlan, StepResult
from atom_cluster.messages.transfer import KvCommand


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A plan's rows, as the scheduler and as the runner knows them, in the same order, and what came of them."""

    rows: list[ScheduledRow]
    steps: tuple[RowStep, ...]
    result: StepResult


class StepPipeline:
    """See the module's docstring. Borrows the runner, of which it makes all calls about plans."""

    def __init__(self, runner: StepRunner, *, depth: int, meter: StepMeter) -> None:
        """depth: plans in flight with which it is full."""
        self._runner = runner
        self._depth = depth
        self._meter = meter
        self._step_ids = itertools.count()
        self._in_flight: deque[tuple[StepPlan, list[ScheduledRow]]] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether there is no result to wait for."""
        return not self._in_flight

    @property
    def is_full(self) -> bool:
        """Whether a result is to be taken before the next plan is made."""
        return len(self._in_flight) >= self._depth

    def submit(
        self,
        step: ScheduledStep,
        *,
        kv: tuple[KvCommand, ...],
        profile: WindowCommand | None,
        grammars: tuple[GrammarCommand, ...],
    ) -> None:
        """Make a plan of a step and of what ranks are to be told besides, and hand it to the runner."""
        plan = StepPlan(
            step_id=next(self._step_ids),
            freed_rows=step.freed_rows,
            new_rows=tuple(step.new_rows),
            rows=tuple(step.steps),
            kv=kv,
            profile=profile,
            grammars=grammars,
        )
        self._runner.submit(plan)
        self._in_flight.append((plan, step.rows))
        self._meter.submitted(step)

    def collect(self, timeout_s: float) -> FinishedStep | None:
        """The oldest plan with its result; None if that was not there in time. Raises what the runner raises."""
        result = self._runner.collect(timeout_s)
        if result is None:
            return None
        plan, rows = self._in_flight.popleft()
        if result.step_id != plan.step_id:
            raise AssertionError(f"step {plan.step_id} was submitted, {result.step_id} came back")
        self._meter.collected(rows, result)
        return FinishedStep(rows, plan.rows, result)
