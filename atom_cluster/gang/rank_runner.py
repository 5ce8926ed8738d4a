"""What a gang needs of a rank's model runner, which `runner.model_runner.ModelRunner` is. Imports no torch."""

from __future__ import annotations

from typing import Protocol

from atom_cluster.messages.steps import StepPlan, StepResult
from atom_cluster.messages.transfer import RankReport
from atom_cluster.runner.rank_info import RankInfo


class Launched(Protocol):
    """A step whose work was issued."""

    def is_done(self) -> bool:
        """Whether `wait` would return at once. Raises what went wrong on the device, even while later work hangs."""
        ...

    def wait(self) -> StepResult:
        """Wait until the work is done."""
        ...


class RankRunner(Protocol):
    """Executes plans on one rank. `launch` is called by one thread, `poll_kv` by one thread, maybe another."""

    @property
    def info(self) -> RankInfo:
        """Constant over the runner's life."""
        ...

    def launch(self, plan: StepPlan) -> Launched:
        """Issue a plan's work. After an exception the runner is unusable."""
        ...

    def poll_kv(self) -> list[RankReport]:
        """This rank's reports on KV commands, profiler windows and grammars since the last call. Never blocks."""
        ...

    def close(self) -> None:
        """Release everything; idempotent."""
        ...
