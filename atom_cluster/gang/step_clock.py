"""How long a rank has been busy with its current step: what tells slow from stuck. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from atom_cluster.engine.protocols import RunnerInfo, StepRunner
from atom_cluster.messages.steps import StepPlan, StepResult
from atom_cluster.messages.transfer import Report


class StepClock:
    """Written by the thread that runs steps, read by any other."""

    def __init__(self) -> None:
        self._state: tuple[int, float | None] = (-1, None)

    def begin(self, step_id: int) -> None:
        """A step is under way from now on."""
        self._state = (step_id, time.monotonic())

    def end(self) -> None:
        """Nothing is under way."""
        self._state = (self._state[0], None)

    @property
    def step_id(self) -> int:
        """The step under way, or the last one; -1 before the first."""
        return self._state[0]

    @property
    def busy_s(self) -> float:
        """Seconds since the step under way began; 0 when there is none."""
        since_s = self._state[1]
        return 0.0 if since_s is None else time.monotonic() - since_s


class ClockedRunner:
    """A `StepRunner` around another one that keeps a clock: a step lasts until its result is collected."""

    def __init__(self, inner: StepRunner, clock: StepClock) -> None:
        self._inner = inner
        self._clock = clock
        self._step_ids: deque[int] = deque()

    @property
    def info(self) -> RunnerInfo:
        """See `StepRunner`."""
        return self._inner.info

    def submit(self, plan: StepPlan) -> None:
        """See `StepRunner`."""
        self._step_ids.append(plan.step_id)
        if len(self._step_ids) == 1:
            self._clock.begin(plan.step_id)
        self._inner.submit(plan)

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """See `StepRunner`."""
        result = self._inner.collect(timeout_s)
        if result is not None:
            self._step_ids.popleft()
            if self._step_ids:
                self._clock.begin(self._step_ids[0])
            else:
                self._clock.end()
        return result

    def poll_kv(self) -> Sequence[Report]:
        """See `StepRunner`."""
        return self._inner.poll_kv()

    def close(self) -> None:
        """See `StepRunner`."""
        self._inner.close()
