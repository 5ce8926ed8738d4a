"""The simulated device notices what an engine may do wrong with windows, states and drafts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from atom_cluster.engine.sim_runner import SimulatedRunner
from atom_cluster.errors import ProtocolError
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, SampledTokens, StepPlan
from tests.factories import expected_tokens, make_prompt, make_runner, states, window
from tests.fakes import VirtualClock

PROMPT = make_prompt(10)
BLOCKS = tuple(range(6))
Pages = tuple[tuple[int, ...], ...]


def start(*, max_drafts: int = 0, acceptance: float = 1.0) -> SimulatedRunner:
    return make_runner(
        VirtualClock(), other_groups=(window(5), states()), max_drafts=max_drafts, draft_acceptance=acceptance
    )


def new_row(tokens: Sequence[int], pages: Pages, *, row: int = 0, drafts: tuple[int, ...] = ()) -> NewRow:
    return NewRow(
        row=row,
        request_id=f"r{row}",
        token_ids=tuple(tokens),
        num_prompt_tokens=len(tokens),
        pages=pages,
        sampling=SamplingParams(seed=0),
        drafts=drafts,
    )


def run(runner: SimulatedRunner, *steps: RowStep, new: tuple[NewRow, ...] = (), freed: tuple[int, ...] = ()) -> Pages:
    """Tokens sampled by each row."""
    return tuple(sampled.token_ids for sampled in results(runner, *steps, new=new, freed=freed))


def results(
    runner: SimulatedRunner, *steps: RowStep, new: tuple[NewRow, ...] = (), freed: tuple[int, ...] = ()
) -> tuple[SampledTokens, ...]:
    runner.submit(StepPlan(step_id=0, freed_rows=freed, new_rows=new, rows=steps))
    result = runner.collect()
    assert result is not None
    return result.sampled


def test_right_pages_give_the_tokens_of_a_model_without_groups() -> None:
    runner = start()
    new = new_row(PROMPT, (BLOCKS, (7, 8, 9, 10, 11, 12), ()))
    chunks = RowStep(0, 0, 8, False, ((), (), (5,))), RowStep(0, 8, 2, True, ((), (), (6,)))
    run(runner, chunks[0], new=(new,))
    tokens = [run(runner, chunks[1])[0][0]]
    tokens += [run(runner, RowStep(0, 10 + i, 1, True))[0][0] for i in range(4)]
    assert tokens == expected_tokens(PROMPT, 5)


@pytest.mark.parametrize("state", [(5,), (3,)])
@pytest.mark.parametrize("column", [8, 3])
def test_another_page_of_a_window_or_another_state_gives_other_tokens(state: tuple[int, ...], column: int) -> None:
    runner = start()
    run(runner, RowStep(0, 0, 8, False, ((), (), (5,))), new=(new_row(PROMPT, (BLOCKS, (7, 8, 9), ())),))
    again = new_row(PROMPT, (BLOCKS, (7, column, 9), state))
    (sampled,) = run(runner, RowStep(0, 8, 2, True, ((), (), (6,))), new=(again,), freed=(0,))
    assert (list(sampled) == expected_tokens(PROMPT, 1)) == (state == (5,) and column == 8)


def test_pages_behind_the_window_do_not_matter() -> None:
    runner = start()
    run(runner, RowStep(0, 0, 8, False, ((), (), (5,))), new=(new_row(PROMPT, (BLOCKS, (7, 8, 9), ())),))
    again = new_row(PROMPT, (BLOCKS, (0, 8, 9), (5,)))
    (sampled,) = run(runner, RowStep(0, 8, 2, True, ((), (), (6,))), new=(again,), freed=(0,))
    assert list(sampled) == expected_tokens(PROMPT, 1)


def test_a_page_that_one_row_writes_and_another_one_uses_in_the_same_step_is_refused() -> None:
    runner = start()
    news = new_row(PROMPT, (BLOCKS, (7, 8, 9), ())), new_row(PROMPT, ((10, 11, 12), (4, 5, 6), ()), row=1)
    steps = RowStep(0, 0, 8, False, ((), (), (5,))), RowStep(1, 0, 8, False, ((), (), (5,)))
    with pytest.raises(ProtocolError, match="used by two rows"):
        run(runner, *steps, new=news)


@pytest.mark.parametrize("pages", [((), (), (5,)), ((), (), (5, 6, 7, 8))])
def test_a_row_with_drafts_needs_a_state_page_for_each(pages: Pages) -> None:
    with pytest.raises(ProtocolError, match="it needs 3"):
        run(start(max_drafts=2), RowStep(0, 0, 4, False, pages), new=(new_row(PROMPT, (BLOCKS, (7, 8), ())),))


@pytest.mark.parametrize("group", [0, 1])
def test_drafting_needs_pages_behind_the_last_token(group: int) -> None:
    pages = [(0, 1, 2), (0, 1, 2)]
    prompt = make_prompt(11)
    plan = RowStep(0, 0, 11, True, ((), (), (5, 6, 7)))
    run(start(max_drafts=2), plan, new=(new_row(prompt, (*pages, ())),))
    pages[group] = pages[group][:2]
    with pytest.raises(ProtocolError, match="12 tokens"):
        run(start(max_drafts=2), plan, new=(new_row(prompt, (*pages, ())),))


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
def test_drafts_change_how_fast_tokens_come_and_not_which(acceptance: float) -> None:
    runner = start(max_drafts=3, acceptance=acceptance)
    new = new_row(PROMPT, (tuple(range(20)), tuple(range(20)), ()))
    (sampled,) = results(runner, RowStep(0, 0, 10, True, ((), (), (1, 2, 3, 4))), new=(new,))
    tokens, num_steps = list(sampled.token_ids), 0
    while len(tokens) < 30:
        assert len(sampled.drafts) == 3
        (sampled,) = results(runner, RowStep(0, 9 + len(tokens), 4, True, (), 3))
        tokens += sampled.token_ids
        num_steps += 1
    assert tokens[:30] == expected_tokens(PROMPT, 30)
    assert {0.0: num_steps == 29, 0.6: 8 < num_steps < 29, 1.0: num_steps == 8}[acceptance]


def test_drafts_of_another_engine_are_verified_like_those_of_its_own() -> None:
    first, second, third, fourth = expected_tokens(PROMPT, 4)
    runner = start(max_drafts=2)
    run(runner, RowStep(0, 0, 10, True, ((), (), (5, 6, 7))), new=(new_row(PROMPT, (BLOCKS, (7, 8, 9, 10), ())),))
    for drafts, expected in (
        ((second, third), (second, third, fourth)),
        ((second, 0), (second, third)),
        ((0, 0), (second,)),
    ):
        new = new_row((*PROMPT, first), (BLOCKS, (7, 8, 9, 10), (5,)), drafts=drafts)
        assert run(runner, RowStep(0, 10, 3, True, ((), (), (8, 9, 11)), 2), new=(new,), freed=(0,)) == (expected,)
