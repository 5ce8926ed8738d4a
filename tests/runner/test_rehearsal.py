"""Steps are rehearsed in full only where something has to be compiled; too little memory is left to the profile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from atom_cluster.layers.forward_batch import ForwardBatch
from atom_cluster.ops.compile_ahead import CompiledAhead
from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.runner.rehearsal import rehearsal_pages, rehearse
from atom_cluster.runner.warm_up import warm_up_plans
from tests.runner.context_model import ContextModel, make_memory, make_runner

BUDGET = 48


class Model(ContextModel):
    """Counts its steps. most_tokens: that a step may have for the memory that there is."""

    def __init__(self, most_tokens: int = BUDGET) -> None:
        super().__init__()
        self.num_steps = 0
        self._most_tokens = most_tokens

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        if len(batch.token_ids) > self._most_tokens:
            raise torch.OutOfMemoryError
        self.num_steps += 1
        return super().forward(batch)


def rehearsed(model: Model, compiled: list[int]) -> str:
    """What came of a rehearsal. compiled: kernels that were not on disk, by context; an item is removed for each."""

    @contextmanager
    def compile_ahead(device: torch.device, *, num_threads: int, begin_at: float = 0.0) -> Iterator[CompiledAhead]:
        assert num_threads >= 1
        ahead = CompiledAhead()
        yield ahead
        ahead.num_kernels, ahead.num_compiled = 20, compiled.pop(0)

    return rehearse(
        model,
        ProcessGroups.single(),
        replace(torch_table("test"), compile_ahead=compile_ahead),
        info(model),
        max_num_batched_tokens=BUDGET,
        device=torch.device("cpu"),
    )


def info(model: Model) -> RankInfo:
    return make_runner(model=model, memory=make_memory(model, rehearsal_pages(model.kv_layout, 0))).info


def num_warm_up_steps(model: Model) -> int:
    plans = warm_up_plans(model.kv_layout, info(model), max_num_batched_tokens=BUDGET, decodes=True)
    return sum(1 for plan in plans if plan.rows)


def test_all_steps_are_rehearsed_if_one_of_the_first_needed_a_compiler() -> None:
    model, compiled = Model(), [2, 5]
    assert rehearsed(model, compiled).startswith("20 looked up, 7 of them compiled, by ")
    assert compiled == []
    assert model.num_steps > num_warm_up_steps(model)


def test_a_few_are_enough_if_none_did() -> None:
    model, compiled = Model(), [0, 5]
    assert rehearsed(model, compiled).startswith("20 looked up, 0 of them compiled, by ")
    assert compiled == [5]
    assert 0 < model.num_steps < num_warm_up_steps(model) / 8


def test_a_step_that_does_not_fit_is_left_to_the_profile() -> None:
    model = Model(most_tokens=16)
    assert "does not fit into memory" in rehearsed(model, [1, 1])
    assert model.num_steps > 0
