from __future__ import annotations

import pytest

from atom_cluster.errors import ProtocolError
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan, StepResult
from tests.runner.context_model import BLOCK, GREEDY, ModelRunner, continuation, make_runner

PROMPT = (5, 17, 3, 88, 41, 2, 60, 9, 13)


def new_row(row: int, tokens: tuple[int, ...], blocks: tuple[int, ...], sampling: SamplingParams = GREEDY) -> NewRow:
    return NewRow(
        row=row,
        request_id=f"r{row}",
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        pages=(blocks,),
        sampling=sampling,
    )


def blocks_for(first: int) -> tuple[int, ...]:
    """Scattered blocks for ten blocks' worth of tokens, disjoint for different multiples of ten."""
    return tuple(first + (i * 7) % 10 for i in range(10))


def token(result: StepResult, row: int) -> int:
    (found,) = [sampled.token_ids for sampled in result.sampled if sampled.row == row]
    return found[0]


def decode(runner: ModelRunner, row: int, start: int, num_tokens: int, *, first_step: int = 1) -> list[int]:
    tokens = []
    for i in range(num_tokens):
        plan = StepPlan(step_id=first_step + i, rows=(RowStep(row, start + i, 1, samples=True),))
        tokens.append(token(runner.run(plan), row))
    return tokens


def test_a_prompt_and_its_decode_steps_follow_the_model() -> None:
    runner = make_runner()
    first = runner.run(
        StepPlan(
            step_id=0,
            new_rows=(new_row(2, PROMPT, blocks_for(10)),),
            rows=(RowStep(2, 0, len(PROMPT), samples=True),),
        )
    )
    assert first.step_id == 0
    assert first.run_s > 0
    found = [token(first, 2), *decode(runner, 2, len(PROMPT), 6)]
    assert found == continuation(PROMPT, 7)


@pytest.mark.parametrize("cuts", [(4,), (1, 2), (3, 4, 5, 8)])
def test_chunks_compute_what_the_whole_prompt_does(cuts: tuple[int, ...]) -> None:
    runner = make_runner()
    bounds = (0, *cuts, len(PROMPT))
    for step, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        is_last = stop == len(PROMPT)
        result = runner.run(
            StepPlan(
                step_id=step,
                new_rows=(new_row(0, PROMPT, blocks_for(0)),) if step == 0 else (),
                rows=(RowStep(0, start, stop - start, samples=is_last),),
            )
        )
        assert bool(result.sampled) == is_last
    assert token(result, 0) == continuation(PROMPT, 1)[0]


def test_mixed_rows_in_one_step_do_not_disturb_each_other() -> None:
    runner = make_runner()
    runner.run(
        StepPlan(
            step_id=0,
            new_rows=(new_row(3, PROMPT, blocks_for(0)), new_row(1, PROMPT[::-1], blocks_for(10))),
            rows=(RowStep(3, 0, len(PROMPT), samples=True), RowStep(1, 0, 4, samples=False)),
        )
    )
    mixed = runner.run(
        StepPlan(
            step_id=1,
            new_rows=(new_row(0, (7,), blocks_for(20)),),
            rows=(
                RowStep(3, len(PROMPT), 1, samples=True),
                RowStep(0, 0, 1, samples=True),
                RowStep(1, 4, len(PROMPT) - 4, samples=True),
            ),
        )
    )
    assert [sampled.row for sampled in mixed.sampled] == [3, 0, 1]
    assert token(mixed, 3) == continuation(PROMPT, 2)[1]
    assert token(mixed, 0) == continuation((7,), 1)[0]
    assert token(mixed, 1) == continuation(PROMPT[::-1], 1)[0]


def test_blocks_are_appended_as_the_row_grows() -> None:
    runner = make_runner()
    runner.run(StepPlan(step_id=0, new_rows=(new_row(0, (1, 2, 3), (9,)),), rows=(RowStep(0, 0, 3, samples=True),)))
    found = []
    for i, blocks in enumerate([(), (4,), (), (), (), (8,), ()]):
        plan = StepPlan(step_id=1 + i, rows=(RowStep(0, 3 + i, 1, samples=True, new_pages=(blocks,)),))
        found.append(token(runner.run(plan), 0))
    assert found == continuation((1, 2, 3), 8)[1:]


def test_a_freed_row_can_be_reused_in_the_same_plan() -> None:
    runner = make_runner()
    runner.run(
        StepPlan(step_id=0, new_rows=(new_row(0, PROMPT, blocks_for(0)),), rows=(RowStep(0, 0, 9, samples=True),))
    )
    result = runner.run(
        StepPlan(
            step_id=1,
            freed_rows=(0,),
            new_rows=(new_row(0, (8, 9), (31,)),),
            rows=(RowStep(0, 0, 2, samples=True),),
        )
    )
    assert token(result, 0) == continuation((8, 9), 1)[0]


def test_a_request_that_comes_back_with_its_output_goes_on_as_if_undisturbed() -> None:
    sampling = SamplingParams(temperature=1.5, seed=7, frequency_penalty=0.5)
    undisturbed = make_runner()
    start = StepPlan(
        step_id=0, new_rows=(new_row(0, PROMPT, blocks_for(0), sampling),), rows=(RowStep(0, 0, 9, samples=True),)
    )
    expected = [token(undisturbed.run(start), 0), *decode(undisturbed, 0, 9, 8)]
    known = (*PROMPT, *expected[:5])
    resumed = make_runner()
    row = NewRow(
        row=1, request_id="r", token_ids=known, num_prompt_tokens=9, pages=(blocks_for(10),), sampling=sampling
    )
    result = resumed.run(StepPlan(step_id=0, new_rows=(row,), rows=(RowStep(1, 0, len(known), samples=True),)))
    assert [token(result, 1), *decode(resumed, 1, len(known), 3)] == expected[5:]


def test_a_prefix_already_in_kv_memory_is_not_computed_again() -> None:
    runner = make_runner()
    blocks = blocks_for(0)
    runner.run(StepPlan(step_id=0, new_rows=(new_row(0, PROMPT, blocks),), rows=(RowStep(0, 0, 9, samples=True),)))
    shared = (*blocks[:2], 30, 31)
    result = runner.run(
        StepPlan(
            step_id=1,
            new_rows=(new_row(1, (*PROMPT, 4), shared),),
            rows=(RowStep(1, 2 * BLOCK, 2, samples=True),),
        )
    )
    assert token(result, 1) == continuation((*PROMPT, 4), 1)[0]


def test_logprobs_come_for_the_rows_that_asked() -> None:
    runner = make_runner()
    asks = SamplingParams(temperature=0.0, seed=0, logprobs=2)
    result = runner.run(
        StepPlan(
            step_id=0,
            new_rows=(new_row(0, PROMPT, blocks_for(0), asks), new_row(1, PROMPT, blocks_for(10))),
            rows=(RowStep(0, 0, 9, samples=True), RowStep(1, 0, 9, samples=True)),
        )
    )
    with_logprobs, without = result.sampled
    assert without.logprobs is None
    assert with_logprobs.logprobs is not None
    assert with_logprobs.logprobs[0].top[0].token_id == with_logprobs.token_ids[0]
    assert with_logprobs.logprobs[0].top[0].logprob == with_logprobs.logprobs[0].logprob


def test_a_plan_without_rows_gives_an_empty_result() -> None:
    result = make_runner().run(StepPlan(step_id=5))
    assert (result.step_id, result.sampled) == (5, ())


class LazyPieces:
    """Stands for pieces that are recorded when they are first asked for."""

    def __init__(self) -> None:
        self.asked_for: list[int] = []

    def takes(self, num_tokens: int) -> bool:
        self.asked_for.append(num_tokens)
        return False


def test_a_plan_without_rows_records_nothing() -> None:
    runner = make_runner()
    pieces = LazyPieces()
    runner.pieces = pieces  # type: ignore[assignment]
    assert runner.run(StepPlan(step_id=5)).execution == "eager"
    assert not pieces.asked_for


def test_a_request_may_fill_its_context_and_run_once_more() -> None:
    runner = make_runner()
    prompt = tuple(range(39))
    plan = StepPlan(step_id=0, new_rows=(new_row(0, prompt, blocks_for(0)),), rows=(RowStep(0, 0, 39, samples=True),))
    first = token(runner.run(plan), 0)
    again = StepPlan(step_id=1, rows=(RowStep(0, 39, 1, samples=True),))
    assert [first, token(runner.run(again), 0)] == continuation(prompt, 2)


def test_a_plan_for_an_empty_row_is_refused() -> None:
    plan = StepPlan(step_id=0, rows=(RowStep(0, 0, 1, samples=True, new_pages=((1,),)),))
    with pytest.raises(ProtocolError, match="row 0, which is empty"):
        make_runner().run(plan)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((new_row(0, (1,), (1,)), new_row(0, (1,), (2,))), "not freed"),
        ((new_row(0, tuple(range(42)), (1,)),), "more than a row holds"),
        ((new_row(0, (1,), tuple(range(12))),), "more than its context needs"),
    ],
)
def test_rows_that_cannot_be_are_refused(rows: tuple[NewRow, ...], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        make_runner().run(StepPlan(step_id=0, new_rows=rows))


def test_closing_twice_is_harmless() -> None:
    runner = make_runner()
    runner.close()
    runner.close()
