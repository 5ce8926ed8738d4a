from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.request import Phase
from atom_cluster.errors import Overloaded
from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.observability.metrics import PREEMPTIONS
from tests.engine.scheduling import TOKEN, Loop, shape
from tests.factories import make_request, states, window


def test_decodes_come_before_prompts_and_share_the_budget_with_them() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=12))
    loop.add(make_request(0, 5))
    loop.step()
    loop.add(make_request(1, 30), make_request(2, 4))
    assert shape(loop.step()) == [("r0", 1), ("r1", 11)]
    assert shape(loop.step()) == [("r0", 1), ("r1", 11)]
    assert shape(loop.step()) == [("r0", 1), ("r1", 8), ("r2", 3)]
    assert shape(loop.step()) == [("r0", 1), ("r1", 1), ("r2", 1)]


def test_no_prompt_takes_more_of_a_step_than_a_long_one_may() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=32, long_prefill_tokens=6))
    loop.add(make_request(0, 13), make_request(1, 8))
    assert [shape(loop.step()) for _ in range(3)] == [
        [("r0", 6), ("r1", 6)],
        [("r0", 6), ("r1", 2)],
        [("r1", 1), ("r0", 1)],
    ]


def test_prompts_beside_rows_that_decode_have_a_limit_of_their_own() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=32), prompt_limit=6)
    loop.add(make_request(0, 20, max_tokens=4))
    assert shape(loop.step()) == [("r0", 20)]
    loop.add(make_request(1, 10), make_request(2, 5))
    assert [shape(loop.step()) for _ in range(4)] == [
        [("r0", 1), ("r1", 6)],
        [("r0", 1), ("r1", 4), ("r2", 2)],
        [("r0", 1), ("r1", 1), ("r2", 3)],
        [("r1", 1), ("r2", 1)],
    ]


def test_without_chunks_a_prompt_waits_until_a_step_has_room_for_all_of_it() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=16, chunked_prefill=False))
    loop.add(make_request(0, 10), make_request(1, 10), make_request(2, 2))
    assert shape(loop.step()) == [("r0", 10)]
    assert shape(loop.step()) == [("r0", 1), ("r1", 10), ("r2", 2)]
    loop.run()
    computed = [
        (part.start + part.num_tokens, row.request) for step in loop.steps for part, row in zip(step.steps, step.rows)
    ]
    assert all(end >= request.num_prompt for end, request in computed)


def test_prefill_first_lets_nobody_decode_while_a_prompt_can_be_computed() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=8, policy="prefill_first"))
    loop.add(make_request(0, 4))
    assert shape(loop.step()) == [("r0", 4)]
    loop.add(make_request(1, 14))
    assert [shape(loop.step()) for _ in range(3)] == [[("r1", 8)], [("r1", 6)], [("r0", 1), ("r1", 1)]]


def test_decode_only_computes_prompts_when_nothing_else_can_run() -> None:
    loop = Loop(SchedulerConfig(policy="decode_only"))
    loop.add(make_request(0, 4, max_tokens=3))
    loop.step()
    loop.add(make_request(1, 6))
    assert [shape(loop.step()) for _ in range(3)] == [[("r0", 1)], [("r0", 1)], [("r1", 6)]]


def test_new_prompts_are_held_back_for_a_multiple_of_the_last_prompt_step() -> None:
    loop = Loop(SchedulerConfig(delay_factor=2.0))
    loop.add(make_request(0, 4, max_tokens=50))
    loop.step()
    loop.scheduler.note_step_time(4, 0.5)
    loop.add(make_request(1, 4))
    assert shape(loop.step()) == [("r0", 1)]
    loop.clock.sleep(0.9)
    assert shape(loop.step()) == [("r0", 1)]
    loop.clock.sleep(0.2)
    assert shape(loop.step()) == [("r0", 1), ("r1", 4)]


def test_nothing_is_held_back_while_nobody_runs() -> None:
    loop = Loop(SchedulerConfig(delay_factor=2.0))
    loop.scheduler.note_step_time(4, 100.0)
    loop.add(make_request(0, 4))
    assert shape(loop.step()) == [("r0", 4)]


def test_lower_priority_numbers_run_first_and_equal_ones_in_order_of_arrival() -> None:
    loop = Loop(num_rows=1)
    loop.add(make_request(0, priority=1), make_request(1), make_request(2, priority=-1), make_request(3))
    loop.run()
    assert [request.request_id for request in loop.finished] == ["r2", "r1", "r3", "r0"]


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    loop = Loop(SchedulerConfig(max_waiting_requests=2))
    loop.add(make_request(0))
    loop.scheduler.check_room()
    with pytest.raises(Overloaded, match="2 requests are waiting") as caught:
        loop.scheduler.check_room(num_elsewhere=1)
    assert 1 <= caught.value.retry_after_s <= 2, "nothing is known of its pace"


def test_a_full_queue_says_to_come_back_when_it_will_have_emptied() -> None:
    loop = Loop(SchedulerConfig(max_waiting_requests=10), num_rows=1)
    requests = [make_request(number) for number in range(31)]
    for request in requests:
        loop.scheduler.add(request)
    loop.clock.sleep(1.0)
    for request in requests[:20]:
        loop.clock.sleep(3.0)
        loop.scheduler.remove(request)
    with pytest.raises(Overloaded) as caught:
        loop.scheduler.check_room()
    assert 33 / 2 <= caught.value.retry_after_s <= 33


def test_the_request_that_goes_last_makes_way_and_comes_back_with_all_its_tokens() -> None:
    loop = Loop(num_blocks=6)
    first, second = make_request(0, 10, 12), make_request(1, 10, 12)
    loop.add(first, second)
    loop.step()
    while second.phase is Phase.RUNNING:
        loop.step()
    known = list(second.tokens)
    assert second.num_output > 0
    assert (second.num_computed, second.table.block_ids, second.row) == (0, [], None)
    loop.run()
    assert loop.finished == [first, second]
    resumed = [row for step in loop.steps for row in step.new_rows if row.request_id == "r1"][-1]
    assert list(resumed.token_ids) == known
    assert second.tokens == [*make_request(1, 10).tokens, *[TOKEN] * 12]
    assert loop.metrics.value(PREEMPTIONS) == 1


def test_a_prompt_computed_for_another_engine_holds_all_its_blocks_from_the_start_and_is_not_preempted() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=8), num_blocks=8)
    local, ticket = make_request(0, 6, 20), make_request(1, 22, 1, ticket_id="t")
    loop.add(local, ticket)
    loop.step()
    assert len(ticket.table.block_ids) == 6
    block_ids = list(ticket.table.block_ids)
    while ticket in loop.scheduler._running:
        assert ticket.table.block_ids == block_ids
        loop.step()
    loop.run()
    assert [request.request_id for request in loop.finished] == ["r1", "r0"]


def test_requests_that_wait_with_blocks_in_hand_overtake_those_that_lack_them() -> None:
    loop = Loop(num_blocks=8)
    running, waiting, arrived = make_request(0, 4, 9), make_request(1, 24), make_request(2, 8, 3)
    loop.add(running)
    loop.step()
    loop.add(waiting)
    loop.blocks.extend(arrived.table, 8)
    arrived.tokens.append(TOKEN)
    arrived.num_computed = arrived.num_confirmed = 8
    loop.add(arrived)
    assert shape(loop.step()) == [("r0", 1), ("r2", 1)]
    loop.run()
    assert [request.request_id for request in loop.finished] == ["r2", "r0", "r1"]


def test_blocks_in_the_hand_of_those_that_wait_behind_are_taken_when_nobody_runs() -> None:
    loop = Loop(num_blocks=8)
    first, arrived = make_request(0, 24), make_request(1, 16, 10)
    loop.blocks.extend(arrived.table, 16)
    arrived.tokens.append(TOKEN)
    arrived.num_computed = arrived.num_confirmed = 16
    loop.add(first, arrived)
    assert shape(loop.step()) == [("r0", 24)]
    loop.run()
    assert len(loop.finished) == 2


def test_a_cached_prefix_is_not_computed_again() -> None:
    loop = Loop()
    loop.add(make_request(0, 14))
    loop.run()
    again = make_request(1, 14)
    again.tokens = make_request(0, 14).tokens
    loop.add(again)
    assert shape(loop.step()) == [("r1", 2)]
    assert again.num_cached == 12


def test_one_token_is_computed_even_of_a_prompt_that_is_cached_whole() -> None:
    loop = Loop()
    loop.add(make_request(0, 12))
    loop.run()
    again = make_request(1, 12)
    again.tokens = make_request(0, 12).tokens
    loop.add(again)
    assert shape(loop.step()) == [("r1", 4)]


def test_prompt_tokens_still_to_be_computed_are_counted() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=8), num_rows=1)
    loop.add(make_request(0, 20), make_request(1, 7))
    assert loop.scheduler.count_waiting_tokens() == 27
    loop.step()
    assert loop.scheduler.count_waiting_tokens() == 19


def test_chunks_of_a_model_with_states_end_at_block_boundaries_and_before_the_last_one() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=11), other_groups=(states(),))
    loop.add(make_request(0, 22, 3))
    assert [shape(loop.step())[0][1] for _ in range(4)] == [8, 8, 4, 2]
    again = make_request(1, 22)
    again.tokens = make_request(0, 22).tokens
    loop.add(again)
    assert ("r1", 2) in shape(loop.step())
    assert again.num_cached == 20


def test_a_budget_below_a_block_still_moves_prompts_of_models_with_states() -> None:
    loop = Loop(SchedulerConfig(max_num_batched_tokens=3), other_groups=(states(),))
    loop.add(make_request(0, 10, 2))
    assert [shape(loop.step())[0][1] for _ in range(5)] == [3, 1, 3, 1, 2]


def test_a_prompt_whose_next_chunk_lacks_pages_of_a_window_waits_for_its_own_results() -> None:
    config = SchedulerConfig(max_num_batched_tokens=16, long_prefill_tokens=8)
    loop = Loop(config, other_groups=(window(6, 5),), depth=2)
    loop.add(make_request(0, 40, 2))
    assert shape(loop.step()) == [("r0", 8)]
    loop.run()
    assert loop.metrics.value(PREEMPTIONS) == 0
    assert sum(row.num_tokens for step in loop.steps for row in step.rows) == 41


def test_whoever_goes_last_makes_way_when_any_group_runs_out() -> None:
    loop = Loop(other_groups=(states(3),), max_drafts=1)
    first, second = make_request(0, 10, 30), make_request(1, 10, 3)
    loop.add(second)
    loop.step()
    loop.add(first)
    loop.step()
    assert [request.phase for request in (first, second)] == [Phase.WAITING, Phase.RUNNING]
    loop.run()
    assert len(loop.finished) == 2


def test_a_prompt_that_lacks_pages_does_not_keep_others_from_decoding() -> None:
    config = SchedulerConfig(max_num_batched_tokens=5, long_prefill_tokens=3, policy="prefill_first")
    loop = Loop(config, num_rows=3, other_groups=(window(5, 6),))
    loop.add(*(make_request(number, 5, 2) for number in range(2)), *(make_request(number, 9, 1) for number in (2, 3)))
    loop.run()
    assert len(loop.finished) == 4


def test_only_a_prompt_for_another_engine_that_nothing_can_help_is_called_starved() -> None:
    config = SchedulerConfig(max_num_batched_tokens=8, long_prefill_tokens=4)
    loop = Loop(config, other_groups=(window(20, 10),))
    first, second = (make_request(number, 40, 1, ticket_id=f"t{number}") for number in range(2))
    loop.add(first, second)
    while loop.step().rows:
        assert loop.steps[-1].starved is None
    assert loop.steps[-1].starved is second
    table = loop.blocks.match((1, 2, 3), "arriving", in_first_group=True)
    loop.scheduler.remove(second)
    loop.blocks.rename(second.table, "leased")
    assert loop.step().starved is None, "what is leased comes back"
    loop.blocks.release(second.table)
    loop.blocks.release(table)
    loop.run()
    assert loop.finished == [first]


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 16), st.integers(0, 2)), min_size=1, max_size=15),
    gaps=st.lists(st.integers(0, 6), min_size=15, max_size=15),
    num_blocks=st.integers(12, 40),
    num_rows=st.integers(1, 6),
    depth=st.integers(1, 2),
    config=st.builds(
        SchedulerConfig,
        max_num_batched_tokens=st.sampled_from((1, 5, 16, 64)),
        long_prefill_tokens=st.sampled_from((0, 3)),
        policy=st.sampled_from(("mixed", "prefill_first", "decode_only")),
        max_num_requests=st.integers(1, 6),
    ),
    other_groups=st.sampled_from(((), (window(5, 6),), (window(3, 9), window(8, 14), states(9)), (states(5),))),
    max_drafts=st.sampled_from((0, 0, 1, 3)),
    num_kept=st.functions(like=lambda num_drafts: 0, returns=st.integers(0, 3), pure=True),
)
def test_every_request_of_a_random_trace_finishes_and_gives_back_what_it_held(
    requests: list[tuple[int, int, int]],
    gaps: list[int],
    num_blocks: int,
    num_rows: int,
    depth: int,
    config: SchedulerConfig,
    other_groups: tuple[PageGroup, ...],
    max_drafts: int,
    num_kept: Callable[[int], int],
) -> None:
    loop = Loop(
        config,
        num_blocks=num_blocks,
        num_rows=num_rows,
        depth=depth,
        other_groups=other_groups,
        max_drafts=max_drafts,
        num_kept=lambda num_drafts: min(num_drafts, num_kept(num_drafts)),
    )
    for number, (num_tokens, max_tokens, priority) in enumerate(requests):
        loop.add(make_request(number, num_tokens, max_tokens, priority=priority))
        for _ in range(gaps[number]):
            loop.step()
    loop.run()
    assert len(loop.finished) == len(requests)
    for counts in (loop.blocks.pool.counts_by_name(), *loop.blocks.other_counts().values()):
        assert counts["free"] + counts["cached"] == sum(counts.values())
    assert all(request.num_in_flight == request.num_sampling == 0 for request in loop.finished)
