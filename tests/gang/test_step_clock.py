from __future__ import annotations

from typing import cast

from atom_cluster.engine.local_runner import LocalRunner
from atom_cluster.gang.step_clock import ClockedRunner, StepClock
from atom_cluster.messages.steps import StepPlan
from atom_cluster.runner.model_runner import ModelRunner
from tests.gang.fake_ranks import FakeRank


def test_a_clock_counts_only_while_a_step_is_under_way() -> None:
    clock = StepClock()
    assert (clock.step_id, clock.busy_s) == (-1, 0.0)
    clock.begin(4)
    assert clock.step_id == 4
    assert clock.busy_s > 0
    clock.end()
    assert (clock.step_id, clock.busy_s) == (4, 0.0)


def test_a_step_lasts_until_its_result_is_collected_and_then_the_next_one_counts() -> None:
    clock = StepClock()
    runner = ClockedRunner(LocalRunner(cast("ModelRunner", FakeRank(rank=0, world_size=1))), clock)
    for step_id in (0, 1):
        runner.submit(StepPlan(step_id=step_id))
    assert clock.step_id == 0
    assert runner.collect(10.0) is not None
    assert clock.step_id == 1
    assert clock.busy_s > 0
    assert runner.collect(10.0) is not None
    assert clock.busy_s == 0
    assert runner.collect(0.0) is None
    runner.close()
