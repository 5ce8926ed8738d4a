"""TP n == TP 1: a model split over processes gives the same tokens as a whole one, in float64 so that rounding cannot
flip a near-tie. The ranks are real processes joined by the gang's own channel, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from atom_cluster.engine.local_runner import LocalRunner, merge_rank_infos
from atom_cluster.engine.protocols import RunnerInfo, StepRunner
from atom_cluster.gang.gang_runner import GangRunner
from atom_cluster.gang.shm_sender import ShmPlanSender
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan, StepResult
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions
from tests.draft_models import draft_model_dir
from tests.equivalence.follower_process import run_follower
from tests.processes import forking
from tests.tiny_models import random_tokens, tiny_model_dir

NUM_STEPS = 12
PROMPTS = tuple(tuple(random_tokens(length, seed=length)) for length in (5, 16, 33))
SAMPLINGS = (
    SamplingParams(temperature=0.0, seed=0),
    SamplingParams(temperature=0.8, top_k=20, seed=5),
    SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=6),
)


@dataclass(frozen=True)
class Model:
    directory: Path
    dtype: Literal["float64", "float32"]
    num_drafts: int = 0
    device: Literal["cpu", "cuda"] = "cpu"


def make_options(model: Model, *, rank: int, world_size: int, init_method: str) -> RunnerOptions:
    return RunnerOptions(
        model_dir=str(model.directory),
        dtype=model.dtype,
        device=model.device,
        device_index=0 if model.device == "cpu" else rank,
        rank=rank,
        world_size=world_size,
        init_method=init_method,
        block_size=4,
        num_blocks=64,
        max_num_requests=4,
        max_model_len=128,
        num_drafts=model.num_drafts,
        num_threads=1,
    )


def open_gang(model: Model, world_size: int, meeting_point: Path) -> StepRunner:
    init_method = f"file://{meeting_point}"
    sender = ShmPlanSender(tuple(range(1, world_size)), send_timeout_s=30.0)
    context = forking()
    pipes = []
    for rank in range(1, world_size):
        ours, theirs = context.Pipe()
        options = make_options(model, rank=rank, world_size=world_size, init_method=init_method)
        context.Process(target=run_follower, args=(options, sender.address, theirs), daemon=True).start()
        pipes.append(ours)
    first = build_model_runner(make_options(model, rank=0, world_size=world_size, init_method=init_method))
    infos = [first.info, *(pipe.recv() for pipe in pipes)]
    sender.accept(30.0)
    return GangRunner(
        info=merge_rank_infos(infos), local=LocalRunner(first), poll_local_kv=first.poll_kv, sender=sender
    )


def make_plans(info: RunnerInfo) -> Sequence[StepPlan]:
    """All prompts in one step, one of them in two chunks, then decodes; planned without knowing any token."""
    kinds = ("full", *(group.kind for group in info.other_groups))
    blocks = [tuple(range(21 * row, 21 * row + 21)) for row in range(len(PROMPTS))]
    num_states = 1 + info.max_drafts
    states = [tuple(range(num_states * row, num_states * (row + 1))) for row in range(len(PROMPTS))]
    new_rows = tuple(
        NewRow(
            row=row,
            request_id=str(row),
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            pages=tuple(() if kind == "state" else blocks[row] for kind in kinds),
            sampling=sampling,
        )
        for row, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS))
    )
    new_pages = [tuple(states[row] if kind == "state" else () for kind in kinds) for row in range(len(PROMPTS))]
    short, middle, long = (len(prompt) for prompt in PROMPTS)
    plans = [
        StepPlan(
            step_id=0,
            new_rows=new_rows,
            rows=(
                RowStep(0, 0, short, True, new_pages[0]),
                RowStep(1, 0, middle, True, new_pages[1]),
                RowStep(2, 0, 20, False, new_pages[2]),
            ),
        ),
        StepPlan(
            step_id=1, rows=(RowStep(0, short, 1, True), RowStep(1, middle, 1, True), RowStep(2, 20, long - 20, True))
        ),
    ]
    for step in range(2, NUM_STEPS):
        starts = (short + step - 1, middle + step - 1, long + step - 2)
        plans.append(
            StepPlan(step_id=step, rows=tuple(RowStep(row, start, 1, True) for row, start in enumerate(starts)))
        )
    return plans


def run(runner: StepRunner) -> dict[int, list[int]]:
    """Tokens by row, with two plans in flight."""
    tokens: dict[int, list[int]] = {}
    plans = make_plans(runner.info)
    runner.submit(plans[0])
    for index in range(len(plans)):
        if index + 1 < len(plans):
            runner.submit(plans[index + 1])
        result = runner.collect(60.0)
        assert result is not None and result.step_id == index
        for sampled in result.sampled:
            tokens.setdefault(sampled.row, []).extend(sampled.token_ids)
    return tokens


def run_with_drafts(runner: StepRunner) -> list[StepResult]:
    """Results of steps, each of which verifies all drafts of the one before."""
    plan = make_plans(runner.info)[0]
    lengths = {row.row: len(row.token_ids) for row in plan.new_rows}
    rows = tuple(RowStep(step.row, 0, lengths[step.row], True, step.new_pages) for step in plan.rows)
    plan = StepPlan(step_id=0, new_rows=plan.new_rows, rows=rows)
    results = []
    for step in range(NUM_STEPS):
        runner.submit(plan)
        result = runner.collect(60.0)
        assert result is not None
        results.append(StepResult(step_id=step, sampled=result.sampled))
        rows = ()
        for one in result.sampled:
            lengths[one.row] += len(one.token_ids)
            rows += (RowStep(one.row, lengths[one.row] - 1, 1 + len(one.drafts), True, num_drafts=len(one.drafts)),)
        plan = StepPlan(step_id=step + 1, rows=rows)
    assert any(len(one.token_ids) > 1 for result in results for one in result.sampled)
    return results


def assert_split_equals_whole(model: Model, world_size: int, meeting_point: Path) -> None:
    whole = LocalRunner(build_model_runner(make_options(model, rank=0, world_size=1, init_method="")))
    split = open_gang(model, world_size, meeting_point)
    try:
        assert split.info.world_size == world_size
        assert split.info.vocab_size == whole.info.vocab_size
        if model.num_drafts:
            assert run_with_drafts(split) == run_with_drafts(whole)
            return
        expected = run(whole)
        assert [len(expected[row]) for row in range(3)] == [NUM_STEPS, NUM_STEPS, NUM_STEPS - 1]
        assert run(split) == expected
    finally:
        whole.close()
        split.close()


@pytest.mark.parametrize("name", ["llama", "llama_tied_bias", "qwen2", "qwen3"])
def test_two_ranks_give_the_tokens_of_one(name: str, tmp_path: Path) -> None:
    assert_split_equals_whole(Model(tiny_model_dir(name), "float64"), 2, tmp_path / "meeting_point")


@pytest.mark.parametrize("name", ["glm4_moe", "mimo_v2", "qwen3_next"])
def test_two_ranks_draft_and_verify_as_one_does(name: str, tmp_path: Path) -> None:
    directory = draft_model_dir(name)
    assert_split_equals_whole(Model(directory, "float64", num_drafts=3), 2, tmp_path / "meeting_point")


@pytest.mark.demo_model
def test_three_ranks_of_the_demo_model_give_the_tokens_of_one(demo_model: Path, tmp_path: Path) -> None:
    # Three, since its 9 query heads and 3 KV heads do not divide by two.
    assert_split_equals_whole(Model(demo_model, "float32"), 3, tmp_path / "meeting_point")
