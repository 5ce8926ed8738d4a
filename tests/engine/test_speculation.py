"""Drafts in scheduler and engine: what is planned, what a result does, what clients see."""

from __future__ import annotations

import pytest

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.request import Phase
from atom_cluster.engine.speculation import DraftStatistics
from atom_cluster.messages.requests import CancelRequest
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import (
    GENERATION_TOKENS,
    KV_TRANSFER_FAILURES,
    PREEMPTIONS,
    SPEC_ACCEPTED_TOKENS,
    SPEC_DRAFT_TOKENS,
    NullMetrics,
)
from tests.engine.scheduling import TOKEN, Loop, shape
from tests.engine.split import make_split
from tests.factories import (
    assert_clean,
    check_integrity,
    expected_tokens,
    make_engine,
    make_message,
    make_prompt,
    make_request,
    make_runner,
    states,
    window,
)
from tests.fakes import Network, RecordingRunner, VirtualClock

# --- planning


def test_a_row_verifies_its_drafts_together_with_its_newest_token() -> None:
    loop = Loop(max_drafts=2)
    loop.add(make_request(0, 5, max_tokens=9))
    assert shape(loop.step()) == [("r0", 5)]
    step = loop.step()
    assert [(row.start, row.num_tokens, row.num_drafts, row.samples) for row in step.steps] == [(5, 3, 2, True)]
    assert [(row.start, row.num_drafts) for row in loop.step().steps] == [(8, 2)]


@pytest.mark.parametrize("num_kept", [0, 1, 2])
def test_the_next_step_starts_behind_the_last_kept_token(num_kept: int) -> None:
    loop = Loop(max_drafts=2, num_kept=lambda num_drafts: min(num_drafts, num_kept))
    request = make_request(0, 5, max_tokens=20)
    loop.add(request)
    loop.step()
    loop.step()
    assert len(request.tokens) == 7 + num_kept
    assert request.num_computed == request.num_confirmed == 6 + num_kept
    assert loop.step().steps[0].start == 6 + num_kept
    loop.run()
    assert request.tokens[5:] == [TOKEN] * 20


def test_a_block_whose_last_token_is_not_computed_is_not_offered_whatever_was_drafted_there() -> None:
    loop = Loop(max_drafts=2, num_kept=lambda _: 0)
    request = make_request(0, 6, max_tokens=9)
    loop.add(request)
    loop.step()
    loop.step()
    assert (len(request.tokens), request.num_confirmed) == (8, 7)
    assert request.table.num_named == 1
    loop.step()
    assert request.table.num_named == 2


def test_no_more_is_drafted_than_there_is_left_to_sample() -> None:
    loop = Loop(max_drafts=3, num_kept=lambda _: 0)
    loop.add(make_request(0, 5, max_tokens=4))
    assert [loop.step().steps[0].num_drafts for _ in range(4)] == [0, 2, 1, 0]
    assert not loop.scheduler.num_running


def test_drafts_are_left_out_where_the_budget_ends() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=6), max_drafts=3, num_kept=lambda _: 0)
    loop.add(make_request(0, 3), make_request(1, 3))
    loop.step()
    assert shape(loop.step()) == [("r0", 4), ("r1", 2)]


def test_drafts_keep_neither_other_rows_nor_prompts_waiting() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=12), max_drafts=3)
    for number in range(4):
        loop.add(make_request(number, 2, max_tokens=100))
    loop.step()
    assert [row.num_drafts for row in loop.step().steps] == [0, 3, 3, 2]
    loop.add(make_request(4, 40, max_tokens=2))
    steps = {row.row: row for row in loop.step().steps}
    assert sum(row.num_tokens for row in steps.values()) == 12
    assert sorted(row.num_drafts for row in steps.values() if row.samples) == [0, 0, 1, 3]


def test_rows_with_drafts_stand_between_single_tokens_and_chunks() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=12), max_drafts=2, num_kept=lambda _: 0)
    loop.add(make_request(0, 3, max_tokens=9), make_request(1, 3, max_tokens=2))
    loop.step()
    loop.add(make_request(2, 30))
    assert shape(loop.step()) == [("r1", 1), ("r0", 3), ("r2", 8)]
    assert [row.num_prompt_tokens for row in loop.steps[-1].rows] == [0, 0, 8]


def test_pages_are_there_for_what_drafting_writes_behind_the_last_token() -> None:
    loop = Loop(max_drafts=3)
    request = make_request(0, 7, max_tokens=9)
    loop.add(request)
    loop.step()
    assert len(request.table.block_ids) == 3, "7 tokens, and 2 more of drafting"


@pytest.mark.parametrize("num_kept", [0, 1, 2])
def test_the_next_step_is_planned_before_it_is_known_how_many_drafts_were_kept(num_kept: int) -> None:
    loop = Loop(max_drafts=2, depth=2, num_kept=lambda num_drafts: min(num_drafts, num_kept))
    request = make_request(0, 3, max_tokens=20)
    loop.add(request)
    first, second, third = (loop.step().steps[0] for _ in range(3))
    assert (first.start, first.num_tokens) == (0, 3)
    assert (second.start, second.num_drafts) == (3, 2)
    # Nothing is known of the second: it computed positions 3 to 5 at most.
    assert (third.start, third.num_drafts) == (6, 2)
    assert len(request.table.block_ids) == 3, "9 tokens, and one more of drafting"
    loop.run()
    assert request.tokens[3:] == [TOKEN] * 20
    assert request.num_unverified == 0


def test_a_request_with_states_and_drafts_waits_for_its_result_while_others_go_on() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=8), max_drafts=2, depth=2, other_groups=(states(32),))
    loop.add(make_request(0, 3), make_request(1, 20))
    assert shape(loop.step())[0] == ("r0", 3)
    assert [name for name, _ in shape(loop.step())] == ["r1"]
    assert shape(loop.step())[0] == ("r0", 3)


def test_a_preempted_request_comes_back_without_drafts_and_with_all_its_tokens() -> None:
    loop = Loop(num_blocks=8, max_drafts=2, num_kept=lambda num_drafts: min(1, num_drafts))
    first, second = make_request(0, 10, 12), make_request(1, 10, 12)
    loop.add(first, second)
    loop.step()
    while second.phase is Phase.RUNNING:
        loop.step()
    known = list(second.tokens)
    assert (second.drafts, second.num_computed) == ((), 0)
    loop.run()
    resumed = [row for step in loop.steps for row in step.new_rows if row.request_id == "r1"][-1]
    assert (list(resumed.token_ids), resumed.drafts) == (known, ())
    assert len(second.tokens) == 22
    assert loop.metrics.value(PREEMPTIONS) == 1


# --- the engine


def start(network: Network, *, max_drafts: int, acceptance: float = 0.7, **values: object) -> EngineCore:
    runner = make_runner(network.clock, max_drafts=max_drafts, draft_acceptance=acceptance)
    return make_engine(network, runner=RecordingRunner(runner, samples_eos=True), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_drafts", [1, 3])
@pytest.mark.parametrize("acceptance", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("is_async", [False, True])
def test_the_answer_is_the_one_without_speculation(max_drafts: int, acceptance: float, is_async: bool) -> None:
    network = Network(VirtualClock())
    engine = start(
        network,
        max_drafts=max_drafts,
        acceptance=acceptance,
        scheduler=SchedulerConfig(async_scheduling=is_async, max_num_batched_tokens=16),
    )
    prompts = {f"r{i}": make_prompt(3 + 7 * i, seed=i) for i in range(4)}
    for request_id, prompt in prompts.items():
        engine.put("client", make_message(request_id, prompt, 13))
    network.settle()
    for request_id, prompt in prompts.items():
        assert network.answers[request_id].tokens == expected_tokens(prompt, 13)
        assert network.answers[request_id].reason == "length"
    assert_clean(engine)


@pytest.mark.parametrize("position", range(1, 9))
def test_an_answer_is_cut_at_a_stop_token_wherever_among_the_drafts_it_is(position: int) -> None:
    network = Network(VirtualClock())
    metrics = MemoryMetrics()
    engine = start(network, max_drafts=3, acceptance=1.0, metrics=metrics)
    tokens = expected_tokens(make_prompt(10), 9)
    engine.put("client", make_message("r", 10, 30, eos=(tokens[position],), logprobs=1))
    network.settle()
    answer = network.answers["r"]
    assert (answer.tokens, answer.reason) == (tokens[: position + 1], "stop")
    assert answer.final is not None
    assert len(answer.final.logprobs or ()) == len(answer.final.token_ids)
    assert metrics.value(GENERATION_TOKENS) == position + 1
    assert_clean(engine)


@pytest.mark.parametrize("max_tokens", range(1, 10))
def test_an_answer_has_no_more_tokens_than_asked_for(max_tokens: int) -> None:
    network = Network(VirtualClock())
    engine = start(network, max_drafts=3, acceptance=1.0)
    engine.put("client", make_message("r", 10, max_tokens))
    network.settle()
    assert network.answers["r"].tokens == expected_tokens(make_prompt(10), max_tokens)


def test_a_step_that_keeps_drafts_is_one_delta_of_several_tokens() -> None:
    network = Network(VirtualClock())
    engine = start(network, max_drafts=3, acceptance=1.0)
    engine.put("client", make_message("r", 10, 9))
    sizes = set()
    for _ in range(10):
        engine.step()
        sizes.add(len(network.answers["r"].tokens) if "r" in network.answers else 0)
    assert sorted(sizes) == [0, 1, 5, 9]


def test_the_context_and_the_cache_can_be_filled_to_the_end() -> None:
    network = Network(VirtualClock())
    runner = make_runner(network.clock, num_blocks=8, max_model_len=40, max_drafts=3, draft_acceptance=1.0)
    engine = make_engine(network, runner=runner)
    assert runner.info.max_request_tokens == 30
    engine.put("client", make_message("fits", 10, 20))
    engine.put("client", make_message("cut", 10, 21))
    network.settle()
    assert network.answers["fits"].tokens == expected_tokens(make_prompt(10), 20)
    assert network.answers["cut"].tokens == expected_tokens(make_prompt(10), 20)
    assert_clean(engine)


@pytest.mark.parametrize("num_steps", range(1, 7))
def test_a_request_cancelled_while_drafts_are_verified_leaves_nothing(num_steps: int) -> None:
    network = Network(VirtualClock())
    engine = start(network, max_drafts=2)
    engine.put("client", make_message("r", 10, 50))
    for _ in range(num_steps):
        engine.step()
    engine.put("client", CancelRequest("r"))
    network.settle()
    assert_clean(engine)


def test_what_became_of_drafts_is_counted_by_position() -> None:
    network = Network(VirtualClock())
    metrics = MemoryMetrics()
    scheduler = SchedulerConfig(async_scheduling=False)
    engine = start(network, max_drafts=2, acceptance=1.0, metrics=metrics, scheduler=scheduler)
    engine.put("client", make_message("r", 10, 8))  # 1 + 3 + 3 + 1: the last token needs no draft
    network.settle()
    assert engine.drafts.drafted == engine.drafts.accepted == [2, 2]
    assert metrics.value(SPEC_DRAFT_TOKENS, position="1") == metrics.value(SPEC_ACCEPTED_TOKENS, position="1") == 2


def test_statistics_are_told_in_words() -> None:
    statistics = DraftStatistics(NullMetrics())
    assert "no drafts" in statistics.describe()
    for num_accepted in (2, 1, 0, 0):
        statistics.note(2, num_accepted)
    text = statistics.describe()
    assert "acceptance rate: 37.50%" in text
    assert "mean accepted length: 1.750" in text
    assert "draft 1: 50.00% of 4" in text
    assert "draft 2: 25.00% of 4" in text


# --- with page groups, and between engines


@pytest.mark.parametrize("max_drafts", [0, 2])
def test_a_prompt_computed_elsewhere_goes_on_with_windows_states_and_drafts(max_drafts: int) -> None:
    groups = (window(6, 40), states(20))
    split = make_split(other_groups=groups, max_drafts=max_drafts)
    split.send("r", 30, max_tokens=12)
    split.send("s", 16, max_tokens=12)
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    first = next(row for plan in split.decode_runner.plans for row in plan.new_rows)
    assert len(first.drafts) == max_drafts
    assert len(first.pages[2]) == 1
    computed = [row for plan in split.decode_runner.plans for row in plan.rows]
    assert all(row.num_tokens == 1 + row.num_drafts for row in computed), "decode computes nothing of the prompts"
    assert {len(row.new_pages[2]) for row in computed if row.new_pages} <= {0, 1 + max_drafts}


@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_damaged_page_of_any_group_lets_the_prompt_be_computed_again_from_its_start(group: int) -> None:
    split = make_split(other_groups=(window(6, 40), states(20)), max_drafts=1)
    split.damage(group)
    split.send("r", 30, max_tokens=12)
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    computed = [row for plan in split.decode_runner.plans for row in plan.rows]
    assert (computed[0].start, computed[0].num_tokens) == (0, 28), "up to the last block boundary"


def test_a_prompt_for_another_engine_that_can_never_get_its_pages_is_given_up() -> None:
    # Both prompts fit the first group. Each comes to need six pages of the window at a time, of which there are ten.
    policy = SchedulerConfig(max_num_batched_tokens=8, long_prefill_tokens=4)
    split = make_split(other_groups=(window(20, 10),), prefill_policy=policy)
    split.send("r", 40, max_tokens=4)
    split.send("s", make_prompt(40, seed=9), max_tokens=4)
    split.network.settle()
    split.assert_right()
    split.assert_clean()
    assert split.metrics.value(KV_TRANSFER_FAILURES, reason="prefill_failed") == 1


def test_a_lone_request_moves_a_window_that_barely_fits_through_a_long_prompt() -> None:
    network = Network(VirtualClock())
    runner = RecordingRunner(make_runner(network.clock, other_groups=(window(10, 5),)))
    engine = make_engine(network, runner=runner, prefix_caching=False)
    network.after_step = lambda: check_integrity(engine)
    engine.put("client", make_message("r", 60, 10))
    network.settle()
    assert network.answers["r"].tokens == expected_tokens(make_prompt(60), 10)
    assert max(row.num_tokens for plan in runner.plans for row in plan.rows) <= 8
    assert sum(row.num_tokens for plan in runner.plans for row in plan.rows) == 69, "nothing is computed twice"


def test_statuses_count_pages_of_every_group() -> None:
    network = Network(VirtualClock())
    engine = make_engine(network, runner=make_runner(network.clock, other_groups=(window(6, 40), states(20))))
    status = engine.stats()
    assert {name: sum(counts.values()) for name, counts in status.other_pages_by_state.items()} == {
        "window 6": 40,
        "state": 20,
    }
