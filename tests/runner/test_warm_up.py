"""Steps before the first request: whatever a model keeps, within its limits, and of every size that rows can have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atom_cluster.layers.forward_batch import ForwardBatch
from atom_cluster.messages.steps import StepPlan
from atom_cluster.runner.warm_up import warm_up_plans
from tests.runner.context_model import MAX_MODEL_LEN, ContextModel, make_memory, make_runner
from tests.tiny_models import tiny_model_dir


class Model(ContextModel):
    def _fold_states(self, batch: ForwardBatch) -> list[int]:
        return [0] * len(batch.token_ids)  # rows share pages of states


@pytest.mark.parametrize("more", [[], ["--chip", "gfx942"], ["--quantize", "fp8", "--kv-dtype", "fp8"]], ids=" ".join)
@pytest.mark.parametrize("model", ["llama", "qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_no_later_step_asks_for_a_kernel_that_was_not_compiled_before(
    repo_root: Path, model: str, more: list[str]
) -> None:
    """What Triton compiles kernels anew for, with random steps, on chips that need not be there."""
    found = variants(repo_root, model, more)
    assert found["kernels"] > 15
    assert found["late"] == {}
    assert found["not_rehearsed"] == {}


def test_kernels_for_long_contexts_are_compiled_before_whatever_a_step_may_have(repo_root: Path) -> None:
    found = variants(repo_root, "llama_real_heads", ["--model-len", "2000", "--budget", "100", "--steps", "40"])
    assert "attention_prefill_hopper.attend_kernel" in found["names"]
    assert found["late"] == {}
    assert found["not_rehearsed"] == {}


def variants(repo_root: Path, model: str, more: list[str]) -> dict[str, Any]:
    """What `kernel_variants` prints."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.runner.kernel_variants", str(tiny_model_dir(model, "bfloat16")), *more]
    done = subprocess.run(command, cwd=repo_root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def sizes(plans: list[StepPlan]) -> set[tuple[int, int]]:
    return {(len(plan.rows), plan.num_tokens) for plan in plans}


@pytest.mark.parametrize("num_drafts", [0, 2])
@pytest.mark.parametrize(("num_rows", "budget"), [(1, 8), (6, 40), (9, 16)])
def test_they_run_with_every_kind_of_cache_and_leave_no_row(num_rows: int, budget: int, num_drafts: int) -> None:
    model = Model(window=6, has_state=True, num_draft_layers=min(1, num_drafts))
    memory = make_memory(model, (12, 5, 1 + num_drafts))
    runner = make_runner(model=model, num_rows=num_rows, memory=memory, max_drafts=num_drafts)
    plans = list(warm_up_plans(model.kv_layout, runner.info, max_num_batched_tokens=budget, decodes=False))
    for plan in plans:
        assert len(plan.rows) <= num_rows
        assert plan.num_tokens <= budget
        assert len(runner.run(plan).sampled) == len(plan.rows)
    assert all(row is None for row in runner._table.rows)


def test_rows_and_tokens_grow_up_to_what_a_step_can_have() -> None:
    model = ContextModel()
    memory = make_memory(model, (12,))
    runner = make_runner(model=model, num_rows=6, memory=memory)
    longest = MAX_MODEL_LEN - 1
    found = sizes(list(warm_up_plans(model.kv_layout, runner.info, max_num_batched_tokens=500, decodes=False)))
    assert {(1, 2), (1, 4), (1, 8), (1, longest)} <= found
    beside = min(16, longest)
    assert {(2, 1 + beside), (4, 3 + beside), (6, 5 + beside)} <= found


def test_what_only_some_requests_ask_for_is_asked_for() -> None:
    model = ContextModel()
    runner = make_runner(model=model, num_rows=2, memory=make_memory(model, (12,)))
    asked = [
        row.sampling
        for plan in warm_up_plans(model.kv_layout, runner.info, max_num_batched_tokens=8, decodes=False)
        for row in plan.new_rows
    ]
    assert any(sampling.temperature > 0 and sampling.top_p == 1.0 for sampling in asked)
    assert any(sampling.top_p < 1.0 for sampling in asked)
    for name in ("logprobs", "prompt_logprobs", "frequency_penalty", "logit_bias", "min_tokens"):
        assert any(getattr(sampling, name) for sampling in asked), name
