"""Steps that verify drafts give what plain steps do, with every kind of cache, and keep exactly the right drafts."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.errors import ProtocolError
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from tests.runner.context_model import (
    GREEDY,
    VOCAB,
    ContextModel,
    continuation,
    is_drafted_wrong,
    make_memory,
    make_runner,
)
from tests.runner.row_driver import RowDriver

LENGTHS = (9, 1, 14, 5, 22, 3, 30)
NUM_TOKENS = 25
"""The last prompts fill their context before they have so many."""
PARTS = [
    {"window": None, "has_state": False},
    {"window": 6, "has_state": False},
    {"window": None, "has_state": True},
    {"window": 6, "has_state": True},
]


def prompts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def expected_outputs(seed: int, parts: dict[str, object]) -> list[list[int]]:
    return [continuation(prompt, min(NUM_TOKENS, 41 - len(prompt)), **parts) for prompt in prompts(seed)]  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_steps_without_drafts_follow_the_model(parts: dict[str, object], seed: int) -> None:
    driver = RowDriver(ContextModel(**parts), seed=seed)  # type: ignore[arg-type]
    assert driver.run(prompts(seed), NUM_TOKENS) == expected_outputs(seed, parts)


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("max_drafts", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_output_is_the_models_and_drafts_are_kept_up_to_the_first_wrong_one(
    parts: dict[str, object], max_drafts: int, seed: int
) -> None:
    model = ContextModel(num_draft_layers=1, drafts_wrong=True, **parts)  # type: ignore[arg-type]
    driver = RowDriver(model, max_drafts=max_drafts, seed=seed)
    assert driver.run(prompts(seed), NUM_TOKENS) == expected_outputs(seed, parts)
    assert {one.num_kept for one in driver.verified} == set(range(max_drafts + 1))
    for one in driver.verified:
        are_right = [not is_drafted_wrong(one.position + 1 + i) for i in range(one.num_drafts)]
        assert one.num_kept == (are_right.index(False) if False in are_right else one.num_drafts)


@pytest.mark.parametrize(("num_layers", "max_drafts"), [(2, 2), (3, 3), (2, 4)])
def test_several_drafting_layers_see_each_others_drafts_and_the_last_one_goes_on(
    num_layers: int, max_drafts: int
) -> None:
    parts = PARTS[3]
    model = ContextModel(num_draft_layers=num_layers, **parts)  # type: ignore[arg-type]
    driver = RowDriver(model, max_drafts=max_drafts, has_chunks=False)
    assert driver.run(prompts(5), NUM_TOKENS) == expected_outputs(5, parts)
    # The layer that goes on sees its own earlier inputs, which are right; only the end of the context stops it.
    inner = [one for one in driver.verified if one.position + 1 + one.num_drafts < 38]
    assert len(inner) > 20
    assert all(one.num_kept == one.num_drafts for one in inner)


def test_drafts_are_told_with_the_tokens_that_they_lie_behind() -> None:
    driver = RowDriver(ContextModel(num_draft_layers=1), max_drafts=2)
    driver.run(prompts(1), NUM_TOKENS)
    inner = [(tokens, drafts) for tokens, drafts in driver.drafts if len(tokens) < 37]
    assert len(inner) > 20
    assert all(continuation(tokens, 2) == drafts for tokens, drafts in inner)


SAMPLINGS = (
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=1.4, top_k=20, seed=2, frequency_penalty=0.7),
    SamplingParams(temperature=2.0, top_p=0.7, seed=3, min_tokens=8, stop_token_ids=tuple(range(40))),
    SamplingParams(temperature=1.2, min_p=0.02, seed=4, repetition_penalty=1.4, presence_penalty=0.5),
    GREEDY,
    SamplingParams(temperature=3.0, seed=6),
    SamplingParams(temperature=0.0, seed=7, frequency_penalty=2.0),
)


def test_random_output_with_drafts_equals_output_without_token_for_token() -> None:
    plain = RowDriver(ContextModel(window=6, has_state=True), seed=1)
    expected = plain.run(prompts(2), NUM_TOKENS, samplings=SAMPLINGS)
    assert expected != expected_outputs(2, PARTS[3]), "nothing was random"
    for max_drafts in (1, 3):
        model = ContextModel(window=6, has_state=True, num_draft_layers=1, drafts_wrong=True)
        driver = RowDriver(model, max_drafts=max_drafts, seed=2)
        assert driver.run(prompts(2), NUM_TOKENS, samplings=SAMPLINGS) == expected
        assert {one.num_kept for one in driver.verified} == set(range(max_drafts + 1))


def test_drafts_of_the_models_own_distribution_are_all_kept_since_they_are_drawn_with_the_same_noise() -> None:
    driver = RowDriver(ContextModel(num_draft_layers=1), max_drafts=3, seed=1)
    samplings = [SamplingParams(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01, seed=i) for i in range(len(LENGTHS))]
    driver.run(prompts(3), NUM_TOKENS, samplings=samplings)
    inner = [one for one in driver.verified if one.position + 1 + one.num_drafts < 37]
    assert len(inner) > 20
    assert all(one.num_kept == one.num_drafts for one in inner)


def first_plan(prompt: list[int], sampling: SamplingParams = GREEDY) -> StepPlan:
    new = NewRow(
        row=0,
        request_id="r",
        token_ids=tuple(prompt),
        num_prompt_tokens=len(prompt),
        pages=((3, 1, 4, 0, 5), (2, 0, 7, 1, 6), ()),
        sampling=sampling,
    )
    step = RowStep(0, 0, len(prompt), samples=True, new_pages=((), (), (4, 2, 0)))
    return StepPlan(step_id=0, new_rows=(new,), rows=(step,))


def test_logprobs_come_for_every_kept_token() -> None:
    prompt = prompts(0)[0]
    model = ContextModel(window=6, has_state=True, num_draft_layers=1)
    runner = make_runner(model=model, memory=make_memory(model, (8, 8, 8)), max_drafts=2)
    runner.run(first_plan(prompt, SamplingParams(temperature=0.0, seed=0, logprobs=1)))
    result = runner.run(StepPlan(step_id=1, rows=(RowStep(0, 9, 3, samples=True, num_drafts=2),)))
    (sampled,) = result.sampled
    assert list(sampled.token_ids) == continuation(prompt, 4, **PARTS[3])[1:]  # type: ignore[arg-type]
    assert sampled.logprobs is not None
    assert [found.top[0].token_id for found in sampled.logprobs] == list(sampled.token_ids)


def test_a_row_that_comes_from_another_engine_goes_on_from_its_pages_state_and_drafts() -> None:
    prompt = prompts(0)[0]
    model = ContextModel(window=6, has_state=True, num_draft_layers=1)
    memory = make_memory(model, (8, 8, 8))
    prefill = make_runner(model=model, memory=memory, max_drafts=2)
    (first,) = prefill.run(first_plan(prompt)).sampled
    decode = make_runner(model=model, memory=memory, max_drafts=2)
    arriving = NewRow(
        row=1,
        request_id="r",
        token_ids=(*prompt, *first.token_ids),
        num_prompt_tokens=len(prompt),
        pages=((3, 1, 4, 0, 5), (7, 0, 7, 1, 6), (4,)),
        sampling=GREEDY,
        drafts=first.drafts,
    )
    step = RowStep(1, 9, 3, samples=True, new_pages=((), (), (1, 5, 6)), num_drafts=2)
    (found,) = decode.run(StepPlan(step_id=0, new_rows=(arriving,), rows=(step,))).sampled
    assert [*first.token_ids, *found.token_ids] == continuation(prompt, 4, **PARTS[3])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (RowStep(0, 9, 3, samples=True, num_drafts=1), "verifies 1 drafts in 3 tokens"),
        (RowStep(0, 9, 2, samples=False, num_drafts=1), "verifies 1 drafts"),
        (RowStep(0, 9, 1, samples=True, new_pages=((), (), (1,))), "given 1 pages for states, not 3"),
        (RowStep(0, 9, 1, samples=True, new_pages=((), ())), "2 cache groups, not of 3"),
    ],
)
def test_steps_that_cannot_be_are_refused(step: RowStep, message: str) -> None:
    model = ContextModel(window=6, has_state=True, num_draft_layers=1)
    runner = make_runner(model=model, memory=make_memory(model, (8, 8, 8)), max_drafts=2)
    runner.run(first_plan(prompts(0)[0]))
    with pytest.raises(ProtocolError, match=message):
        runner.run(StepPlan(step_id=1, rows=(step,)))


def test_a_row_without_pages_for_its_states_is_refused() -> None:
    model = ContextModel(has_state=True)
    runner = make_runner(model=model, memory=make_memory(model, (8, 8)))
    new = NewRow(row=2, request_id="r", token_ids=(1,), num_prompt_tokens=1, pages=((0,), ()), sampling=GREEDY)
    with pytest.raises(ProtocolError, match="row 2 has no pages for its states"):
        runner.run(StepPlan(step_id=0, new_rows=(new,), rows=(RowStep(2, 0, 1, samples=True),)))
