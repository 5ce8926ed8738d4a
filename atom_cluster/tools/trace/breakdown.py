"""What the phases of a trace were spent on: numbers only. Knows no file format.

A step's time is from the start of its first kernel to the end of its last one; its period, from there to the start of
the next step, when that is one of the same phase. Busy is when at least one kernel runs; the rest is idle. Where
kernels run at the same time, on several streams or because one starts early to wait for the one before, the time counts
for the one that started first: so kernels, groups and idle time add up to the steps' time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from atom_cluster.tools.trace.events import Step, Trace, Work
from atom_cluster.tools.trace.groups import GROUPS, group_of

NUM_GAPS = 30
"""Rows of the table of gaps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One kernel of a phase."""

    name: str
    group: str
    calls_per_step: float
    us_per_step: float
    """Without what counts for others that ran at the same time."""
    share: float
    """Of the busy time."""
    mean_us: float
    """Of a call from its start to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Steps that do the same work."""

    name: str
    steps: tuple[Step, ...]
    rows: tuple[KernelRow, ...]
    """The most time first."""
    us_by_group: dict[str, float]
    """Per step, in the order of `GROUPS`; only groups that there are."""
    step_us: tuple[float, ...]
    period_us: tuple[float, ...]
    idle_of_periods: float
    """Share of the periods' time, inside of steps and between them; 0 when there are none."""
    busy_us: float
    """Per step."""
    idle_us: float
    """Per step, inside of steps."""
    is_part: bool = False
    """Drafting: counted in the steps that it is part of, too."""

    @property
    def mean_step_us(self) -> float:
        """Mean time of a step."""
        return sum(self.step_us) / len(self.step_us)

    @property
    def idle_share(self) -> float:
        """Of the steps' time."""
        return self.idle_us / self.mean_step_us if self.mean_step_us else 0.0

    @property
    def total_us(self) -> float:
        """Of all steps."""
        return sum(self.step_us)

    def typical_step(self) -> Step:
        """A step whose time is the median."""
        return sorted(zip(self.step_us, range(len(self.steps)), self.steps))[len(self.steps) // 2][2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A time in which the device did nothing."""

    start_us: float
    idle_us: float
    before: str
    after: str
    where: str
    """`in decode bs=8`, or `between prefill and decode bs=8`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """A whole trace."""

    device: str
    phases: tuple[Phase, ...]
    """The most time first; those that are part of others last."""
    span_us: float
    """From the first step's start to the last one's end."""
    idle_in_steps_us: float
    idle_between_steps_us: float
    gaps: tuple[Gap, ...]
    """The largest."""


def break_down(trace: Trace) -> Breakdown:
    """The numbers of a trace."""
    phases = [_phase(name, steps, _neighbours(trace.steps, name)) for name, steps in _by_phase(trace.steps).items()]
    parts = [_phase(name, steps, [], is_part=True) for name, steps in _by_phase(trace.drafts).items()]
    by_time = sorted(phases, key=lambda phase: -phase.total_us)
    first_us = min((step.start_us for step in trace.steps), default=0.0)
    last_us = max((step.end_us for step in trace.steps), default=0.0)
    gaps = _gaps(trace, first_us, last_us)
    return Breakdown(
        device=trace.device,
        phases=(*by_time, *parts),
        span_us=last_us - first_us,
        idle_in_steps_us=sum(gap.idle_us for gap in gaps if gap.where.startswith("in ")),
        idle_between_steps_us=sum(gap.idle_us for gap in gaps if not gap.where.startswith("in ")),
        gaps=tuple(sorted(gaps, key=lambda gap: -gap.idle_us)[:NUM_GAPS]),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed; NaN when there are none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _by_phase(steps: Iterable[Step]) -> dict[str, list[Step]]:
    by_phase: dict[str, list[Step]] = {}
    for step in steps:
        by_phase.setdefault(step.phase, []).append(step)
    return by_phase


def _phase(
    name: str, steps: Sequence[Step], neighbours: Sequence[tuple[Step, Step]], *, is_part: bool = False
) -> Phase:
    num_steps = len(steps)
    period_us = tuple(after.start_us - step.start_us for step, after in neighbours)
    step_us = tuple(step.end_us - step.start_us for step in steps)
    rows = _rows(steps)
    busy_us = sum(row.us_per_step for row in rows)
    us_by_group = {group: sum(row.us_per_step for row in rows if row.group == group) for group in GROUPS}
    return Phase(
        name=name,
        steps=tuple(steps),
        rows=rows,
        us_by_group={group: us for group, us in us_by_group.items() if us},
        step_us=step_us,
        period_us=period_us,
        idle_of_periods=1.0 - sum(_busy_us(step) for step, _ in neighbours) / sum(period_us) if period_us else 0.0,
        busy_us=busy_us,
        idle_us=sum(step_us) / num_steps - busy_us,
        is_part=is_part,
    )


@dataclass(slots=True)
class _Count:
    num_calls: int = 0
    own_us: float = 0.0
    whole_us: float = 0.0


def _rows(steps: Sequence[Step]) -> tuple[KernelRow, ...]:
    counts: dict[str, _Count] = {}
    for step in steps:
        busy_until_us = step.start_us
        for work in step.work:
            count = counts.setdefault(work.name, _Count())
            count.num_calls += work.num_calls
            count.own_us += max(0.0, work.end_us - max(work.start_us, busy_until_us))
            count.whole_us += work.duration_us
            busy_until_us = max(busy_until_us, work.end_us)
    busy_us = sum(count.own_us for count in counts.values())
    rows = [
        KernelRow(
            name=name,
            group=group_of(name),
            calls_per_step=count.num_calls / len(steps),
            us_per_step=count.own_us / len(steps),
            share=count.own_us / busy_us if busy_us else 0.0,
            mean_us=count.whole_us / count.num_calls if count.num_calls else 0.0,
        )
        for name, count in counts.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.us_per_step))


def _neighbours(steps: Sequence[Step], phase: str) -> list[tuple[Step, Step]]:
    """Steps of a phase that another one of it follows, with that one."""
    return [pair for pair in zip(steps, steps[1:]) if pair[0].phase == pair[1].phase == phase]


def _busy_us(step: Step) -> float:
    busy_us, until_us = 0.0, step.start_us
    for work in step.work:
        busy_us += max(0.0, work.end_us - max(work.start_us, until_us))
        until_us = max(until_us, work.end_us)
    return busy_us


def _gaps(trace: Trace, first_us: float, last_us: float) -> list[Gap]:
    """Where nothing runs, between the first step and the last one."""
    gaps: list[Gap] = []
    latest: Work | None = None
    steps, at = trace.steps, 0
    for item in trace.work:
        if item.end_us < first_us or item.start_us > last_us:
            continue
        if latest is not None and item.start_us > latest.end_us:
            while at + 1 < len(steps) and steps[at + 1].start_us <= latest.end_us:
                at += 1
            gaps.append(
                Gap(
                    start_us=latest.end_us,
                    idle_us=item.start_us - latest.end_us,
                    before=latest.name,
                    after=item.name,
                    where=_where(steps, at, item),
                )
            )
        if latest is None or item.end_us > latest.end_us:
            latest = item
    return gaps


def _where(steps: Sequence[Step], at: int, after: Work) -> str:
    """steps[at] is the last step that had begun when the gap did."""
    step = steps[at]
    if after.start_us < step.end_us or at + 1 == len(steps):
        return f"in {step.phase}"
    return f"between {step.phase} and {steps[at + 1].phase}"
