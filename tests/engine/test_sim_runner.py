from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_cluster.config.simulation import SimulationConfig
from atom_cluster.engine.sim_runner import MonotonicClock, SimulatedRunner
from atom_cluster.errors import AtomClusterError, ProtocolError
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, SampledTokens, StepPlan, StepResult
from tests.engine.virtual_clock import VirtualClock

BLOCK_SIZE = 4
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)
INSTANT = SimulationConfig(base_s=0, per_prefill_token_s=0, per_decode_row_s=0, num_blocks=64, vocab_size=1000)
GREEDY = SamplingParams(temperature=0, seed=0)


def make_runner(
    simulation: SimulationConfig = INSTANT, *, clock: VirtualClock | None = None, max_model_len: int = 256
) -> SimulatedRunner:
    return SimulatedRunner(
        simulation=simulation,
        block_size=BLOCK_SIZE,
        max_num_requests=64,
        max_model_len=max_model_len,
        clock=clock or VirtualClock(),
    )


def new_row(
    tokens: Sequence[int],
    blocks: Sequence[int],
    *,
    row: int = 0,
    num_prompt: int | None = None,
    sampling: SamplingParams = GREEDY,
    eos: tuple[int, ...] = (),
) -> NewRow:
    return NewRow(
        row=row,
        request_id=f"r{row}",
        token_ids=tuple(tokens),
        num_prompt_tokens=len(tokens) if num_prompt is None else num_prompt,
        pages=(tuple(blocks),),
        sampling=sampling,
        eos_token_ids=eos,
    )


def run(runner: SimulatedRunner, plan: StepPlan) -> StepResult:
    runner.submit(plan)
    result = runner.collect()
    assert result is not None
    return result


def sample(runner: SimulatedRunner, plan: StepPlan) -> int:
    (sampled,) = run(runner, plan).sampled
    (token_id,) = sampled.token_ids
    return token_id


def decode(runner: SimulatedRunner, start: int, num_tokens: int, *, row: int = 0) -> list[int]:
    """Decode steps that write positions from `start` on, into blocks that the row has already."""
    return [
        sample(runner, StepPlan(step_id=i, rows=(RowStep(row, start + i, 1, samples=True),))) for i in range(num_tokens)
    ]


def answer(
    tokens: Sequence[int], num_tokens: int, *, num_prompt: int | None = None, sampling: SamplingParams = GREEDY
) -> list[int]:
    """What an undisturbed runner answers to a prompt computed as a whole."""
    runner = make_runner()
    blocks = range(10, 10 + (len(tokens) + num_tokens) // BLOCK_SIZE + 1)
    new = new_row(tokens, blocks, num_prompt=num_prompt, sampling=sampling)
    first = sample(runner, StepPlan(step_id=0, new_rows=(new,), rows=(RowStep(0, 0, len(tokens), samples=True),)))
    return [first, *decode(runner, len(tokens), num_tokens - 1)]


# --- tokens


def test_tokens_depend_on_every_token_so_far_and_on_nothing_else() -> None:
    expected = answer(PROMPT, 6)
    assert answer(PROMPT, 6) == expected
    assert answer(PROMPT, 6, sampling=SamplingParams(temperature=1.0, seed=7)) == expected
    for position in range(len(PROMPT)):
        changed = (*PROMPT[:position], 77, *PROMPT[position + 1 :])
        assert answer(changed, 6) != expected
    assert len(set(answer(PROMPT, 200))) > 150


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_a_prompt_in_chunks_gives_the_same_tokens_as_a_whole_one(chunks: list[int]) -> None:
    tokens = [(7 * i + 1) % 1000 for i in range(sum(chunks))]
    runner = make_runner()
    run(runner, StepPlan(step_id=0, new_rows=(new_row(tokens, range(30)),)))
    start = 0
    for chunk in chunks[:-1]:
        assert run(runner, StepPlan(step_id=0, rows=(RowStep(0, start, chunk, samples=False),))).sampled == ()
        start += chunk
    first = sample(runner, StepPlan(step_id=0, rows=(RowStep(0, start, chunks[-1], samples=True),)))
    assert [first, *decode(runner, len(tokens), 4)] == answer(tokens, 5)


@pytest.mark.parametrize("num_done", [1, 2, 3, 7])
def test_a_request_resumed_with_all_tokens_goes_on_as_if_undisturbed(num_done: int) -> None:
    expected = answer(PROMPT, 10)
    tokens = [*PROMPT, *expected[:num_done]]
    assert answer(tokens, 10 - num_done, num_prompt=len(PROMPT)) == expected[num_done:]


def test_the_batch_and_the_rows_that_were_there_before_do_not_matter() -> None:
    runner = make_runner()
    news = tuple(new_row((*PROMPT, row), range(8 * row, 8 * row + 8), row=row) for row in range(4))
    steps = tuple(RowStep(row, 0, len(PROMPT) + 1, samples=True) for row in range(4))
    together = [sampled.token_ids[0] for sampled in run(runner, StepPlan(step_id=0, new_rows=news, rows=steps)).sampled]
    assert together == [answer((*PROMPT, row), 1)[0] for row in range(4)]
    again = new_row(PROMPT, range(16, 24), row=2)
    plan = StepPlan(step_id=1, freed_rows=(2,), new_rows=(again,), rows=(RowStep(2, 0, len(PROMPT), samples=True),))
    assert [sample(runner, plan), *decode(runner, len(PROMPT), 4, row=2)] == answer(PROMPT, 5)


def test_end_of_sequence_is_never_chosen_while_another_token_is_left() -> None:
    small = INSTANT.model_copy(update={"vocab_size": 3})
    for eos in ((1,), (0, 2)):
        runner = make_runner(small)
        new = new_row((0,), range(20), eos=eos)
        first = sample(runner, StepPlan(step_id=0, new_rows=(new,), rows=(RowStep(0, 0, 1, samples=True),)))
        chosen = {first, *decode(runner, 1, 40)}
        assert chosen == {0, 1, 2} - set(eos)
    runner = make_runner(small)
    new = new_row((0,), range(20), eos=(0, 1, 2))
    plan = StepPlan(step_id=0, new_rows=(new,), rows=(RowStep(0, 0, 1, samples=True),))
    assert sample(runner, plan) in {0, 1, 2}


def test_stop_tokens_are_chosen_from_min_tokens_on() -> None:
    expected = answer(PROMPT, 3)
    stopping = SamplingParams(seed=0, stop_token_ids=(expected[0], expected[2]))
    assert answer(PROMPT, 3, sampling=stopping) == expected
    late = SamplingParams(seed=0, stop_token_ids=(expected[0],), min_tokens=1)
    assert answer(PROMPT, 1, sampling=late) != expected[:1]


def test_logprobs_come_when_asked_for_and_the_most_likely_token_is_the_chosen_one() -> None:
    runner = make_runner()
    new = new_row(PROMPT, range(4), sampling=SamplingParams(seed=0, logprobs=2))
    result = run(runner, StepPlan(step_id=0, new_rows=(new,), rows=(RowStep(0, 0, len(PROMPT), samples=True),)))
    ((logprobs,),) = [sampled.logprobs or () for sampled in result.sampled]
    assert logprobs.top[0].token_id == result.sampled[0].token_ids[0]
    assert [top.logprob for top in logprobs.top] == [-math.log(2), -2 * math.log(2)]
    assert logprobs.logprob == logprobs.top[0].logprob


# --- KV contents


def prefill(runner: SimulatedRunner, blocks: Sequence[int], *, row: int = 0, start: int = 0) -> int:
    new = new_row(PROMPT, blocks, row=row)
    rows = (RowStep(row, start, len(PROMPT) - start, samples=True),)
    return sample(runner, StepPlan(step_id=0, freed_rows=(row,), new_rows=(new,), rows=rows))


def test_blocks_of_another_request_with_the_same_prefix_give_the_same_tokens() -> None:
    runner = make_runner()
    prefill(runner, (5, 6, 7))
    cached = prefill(runner, (5, 6, 8, 9), row=1, start=8)
    assert [cached, *decode(runner, len(PROMPT), 4, row=1)] == answer(PROMPT, 5)


@pytest.mark.parametrize("blocks", [(6, 5, 8), (5, 7, 8), (5, 20, 8)], ids=["swapped", "partial", "never written"])
def test_wrong_blocks_for_a_cached_prefix_give_other_tokens(blocks: tuple[int, ...]) -> None:
    runner = make_runner()
    prefill(runner, (5, 6, 7))
    assert prefill(runner, blocks, row=1, start=8) != answer(PROMPT, 1)[0]


@pytest.mark.parametrize("block", [5, 6, 7])
def test_a_corrupt_block_changes_the_next_token_wherever_it_is_in_the_table(block: int) -> None:
    runner = make_runner()
    prefill(runner, (5, 6, 7, 8))
    runner.corrupt(block)
    assert decode(runner, len(PROMPT), 1) != answer(PROMPT, 2)[1:]


def test_a_block_that_another_request_writes_while_it_is_in_use_changes_the_next_token() -> None:
    runner = make_runner()
    prefill(runner, (5, 6, 7, 8))
    other = new_row((9, 9), (6,), row=1)
    run(runner, StepPlan(step_id=1, new_rows=(other,), rows=(RowStep(1, 0, 2, samples=False),)))
    assert decode(runner, len(PROMPT), 1) != answer(PROMPT, 2)[1:]


def test_positions_that_were_skipped_change_the_token() -> None:
    runner = make_runner()
    assert prefill(runner, (5, 6, 7), start=4) != answer(PROMPT, 1)[0]


@pytest.mark.parametrize("corrupt", [5, 6])
def test_computing_again_from_a_bad_block_on_mends_the_request(corrupt: int) -> None:
    runner = make_runner()
    prefill(runner, (5, 6, 7, 8))
    runner.corrupt(corrupt)
    start = (corrupt - 5) * BLOCK_SIZE
    mended = prefill(runner, (5, 6, 7, 8), start=start)
    assert [mended, *decode(runner, len(PROMPT), 3)] == answer(PROMPT, 4)


# --- time


TIMED = SimulationConfig(
    base_s=1.0, per_prefill_token_s=0.1, per_decode_row_s=0.01, per_context_token_s=0.001, num_blocks=64
)


def test_a_step_takes_what_the_latency_model_says() -> None:
    clock = VirtualClock()
    runner = make_runner(TIMED, clock=clock)
    news = (new_row(PROMPT, range(4)), new_row(PROMPT, range(4, 8), row=1))
    result = run(runner, StepPlan(step_id=0, new_rows=news, rows=(RowStep(0, 0, 10, samples=True),)))
    assert clock.now_s() == result.run_s == pytest.approx(1.0 + 10 * 0.1 + 10 * 0.001)
    mixed = StepPlan(step_id=1, rows=(RowStep(0, 10, 1, samples=True), RowStep(1, 0, 6, samples=False)))
    assert run(runner, mixed).run_s == pytest.approx(1.0 + 0.01 + 6 * 0.1 + (11 + 6) * 0.001)


def test_two_steps_in_flight_run_back_to_back_and_come_back_in_order() -> None:
    clock = VirtualClock()
    runner = make_runner(TIMED, clock=clock)
    plan = StepPlan(step_id=0, new_rows=(new_row(PROMPT, range(4)),), rows=(RowStep(0, 0, 10, samples=True),))
    runner.submit(plan)
    runner.submit(StepPlan(step_id=1, rows=(RowStep(0, 10, 1, samples=True),)))
    assert clock.now_s() == 0
    first, second = runner.collect(), runner.collect()
    assert first is not None
    assert second is not None
    assert (first.step_id, second.step_id) == (0, 1)
    assert clock.now_s() == pytest.approx(first.run_s + second.run_s)
    assert first.sampled[0].token_ids != second.sampled[0].token_ids


def test_collect_returns_none_when_the_step_does_not_end_in_time_and_the_result_later() -> None:
    clock = VirtualClock()
    runner = make_runner(TIMED, clock=clock)
    runner.submit(StepPlan(step_id=0, new_rows=(new_row(PROMPT, range(4)),), rows=(RowStep(0, 0, 1, samples=False),)))
    assert runner.collect(timeout_s=0) is None
    assert runner.collect(timeout_s=0.25) is None
    assert clock.now_s() == 0.25
    assert runner.collect(timeout_s=60) is not None
    assert clock.now_s() == pytest.approx(1.101)
    assert runner.collect(timeout_s=1) is None
    with pytest.raises(AtomClusterError, match="nothing to wait for"):
        runner.collect()


def test_a_plan_without_rows_takes_no_time_but_waits_for_the_one_before() -> None:
    clock = VirtualClock()
    runner = make_runner(TIMED, clock=clock)
    assert run(runner, StepPlan(step_id=0, new_rows=(new_row(PROMPT, range(4)),))).run_s == 0
    assert clock.now_s() == 0
    runner.submit(StepPlan(step_id=1, rows=(RowStep(0, 0, 10, samples=True),)))
    runner.submit(StepPlan(step_id=2, freed_rows=(0,)))
    assert (runner.collect() or StepResult(step_id=-1)).step_id == 1
    ended_s = clock.now_s()
    assert (runner.collect() or StepResult(step_id=-1)).step_id == 2
    assert clock.now_s() == ended_s


def test_real_time_passes_while_a_step_runs() -> None:
    clock = MonotonicClock()
    runner = SimulatedRunner(
        simulation=SimulationConfig(base_s=0.02), block_size=4, max_num_requests=1, max_model_len=64
    )
    started_s = clock.now_s()
    plan = StepPlan(step_id=0, new_rows=(new_row(PROMPT, range(4)),), rows=(RowStep(0, 0, 10, samples=True),))
    run(runner, plan)
    assert clock.now_s() - started_s >= 0.02


# --- plans that are out of step


@pytest.mark.parametrize(
    ("new", "rows", "message"),
    [
        (new_row(PROMPT, range(4), row=64), (), "not free"),
        (new_row(PROMPT, range(4)), (RowStep(1, 0, 1, False),), "empty"),
        (new_row(PROMPT, (1, 2, 1)), (), "already"),
        (new_row(PROMPT, (64,)), (), "no block 64"),
        (new_row(PROMPT, range(2)), (RowStep(0, 0, 9, False),), "2 blocks"),
        (new_row(PROMPT, range(4)), (RowStep(0, 0, 11, False),), "10 tokens"),
        (new_row(PROMPT, range(4)), (RowStep(0, 0, 9, True),), "sample"),
    ],
    ids=["row", "empty row", "block twice", "no such block", "no room", "no token", "sample too early"],
)
def test_a_plan_that_cannot_be_right_fails_in_collect_and_ends_the_runner(
    new: NewRow, rows: tuple[RowStep, ...], message: str
) -> None:
    runner = make_runner()
    runner.submit(StepPlan(step_id=0, new_rows=(new,), rows=rows))
    runner.submit(StepPlan(step_id=1))
    assert runner.poll_kv() == []
    with pytest.raises(ProtocolError, match=message):
        runner.collect()
    with pytest.raises(AtomClusterError, match="failed before"):
        runner.submit(StepPlan(step_id=2))


def test_a_row_never_holds_more_than_one_token_beyond_the_context() -> None:
    runner = make_runner(max_model_len=len(PROMPT))
    prefill(runner, range(4))
    with pytest.raises(ProtocolError, match="sample"):
        decode(runner, len(PROMPT), 1)


def test_a_third_plan_in_flight_is_refused() -> None:
    runner = make_runner()
    runner.submit(StepPlan(step_id=0))
    runner.submit(StepPlan(step_id=1))
    with pytest.raises(ProtocolError, match="in flight"):
        runner.submit(StepPlan(step_id=2))


def test_close_is_idempotent_and_ends_the_runner() -> None:
    runner = make_runner()
    runner.submit(StepPlan(step_id=0))
    runner.close()
    runner.close()
    with pytest.raises(AtomClusterError, match="closed"):
        runner.collect()


def test_info_tells_the_simulated_sizes_and_what_must_be_equal_to_exchange_blocks() -> None:
    info = make_runner().info
    assert (info.num_blocks, info.vocab_size, info.block_size, info.world_size) == (64, 1000, BLOCK_SIZE, 1)
    assert info.kv_transports == ("sim",)
    fields = {"model": "simulated", "block_size": "4", "vocab_size": "1000", "groups": ""}
    assert info.fingerprint_fields == fields
    assert make_runner().info.kv_offers != info.kv_offers


def test_results_have_one_entry_per_sampling_row_in_plan_order() -> None:
    runner = make_runner()
    news = tuple(new_row(PROMPT[: row + 2], range(4 * row, 4 * row + 4), row=row) for row in range(3))
    steps = (RowStep(2, 0, 4, True), RowStep(1, 0, 2, False), RowStep(0, 0, 2, True))
    sampled = run(runner, StepPlan(step_id=0, new_rows=news, rows=steps)).sampled
    assert [entry.row for entry in sampled] == [2, 0]
    assert all(isinstance(entry, SampledTokens) and entry.logprobs is None for entry in sampled)
