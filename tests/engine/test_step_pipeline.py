from __future__ import annotations

import pytest

from atom_cluster.engine.scheduler import ScheduledStep
from atom_cluster.engine.step_meter import StepMeter
from atom_cluster.engine.step_pipeline import StepPipeline
from atom_cluster.messages.grammars import ForgetGrammar
from atom_cluster.messages.steps import StepPlan, StepResult
from atom_cluster.messages.transfer import DropPeer
from atom_cluster.observability.metrics import NullMetrics
from tests.factories import make_runner
from tests.fakes import RecordingRunner, VirtualClock


class Rig:
    def __init__(self, depth: int = 2) -> None:
        clock = VirtualClock()
        self.runner = RecordingRunner(make_runner(clock))
        self.pipeline = StepPipeline(self.runner, depth=depth, meter=StepMeter(NullMetrics(), clock))

    def submit(self, step: ScheduledStep | None = None) -> None:
        self.pipeline.submit(step or ScheduledStep(), kv=(), profile=None, grammars=())


@pytest.mark.parametrize("depth", [1, 2])
def test_plans_are_numbered_and_come_back_in_order(depth: int) -> None:
    rig = Rig(depth)
    pipeline = rig.pipeline
    assert (pipeline.is_empty, pipeline.is_full) == (True, False)
    for _ in range(depth):
        rig.submit()
    assert (pipeline.is_empty, pipeline.is_full) == (False, True)
    assert [plan.step_id for plan in rig.runner.plans] == list(range(depth))
    for step_id in range(depth):
        finished = pipeline.collect(0.0)
        assert finished is not None
        assert finished.result == StepResult(step_id=step_id, execution="simulated")
    assert pipeline.is_empty


def test_a_plan_says_what_ranks_are_to_do_besides() -> None:
    rig = Rig()
    commands, forget = (DropPeer(peer="p"),), (ForgetGrammar(grammar_id=1),)
    rig.pipeline.submit(ScheduledStep(freed_rows=(3,)), kv=commands, profile=None, grammars=forget)
    assert rig.runner.plans == [StepPlan(step_id=0, freed_rows=(3,), kv=commands, grammars=forget)]


def test_nothing_is_taken_out_before_its_result_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.submit()
    monkeypatch.setattr(rig.runner, "collect", lambda timeout_s: None)
    assert rig.pipeline.collect(0.0) is None
    assert not rig.pipeline.is_empty


def test_a_result_of_another_step_is_not_taken_for_this_one_s(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.submit()
    monkeypatch.setattr(rig.runner, "collect", lambda timeout_s: StepResult(step_id=5))
    with pytest.raises(AssertionError, match="step 0 was submitted, 5 came back"):
        rig.pipeline.collect(0.0)
