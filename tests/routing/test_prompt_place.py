"""Where a prompt is computed: expected times from measured tables, with what is not known taken from the other side."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.messages.cluster import EngineSpeed
from atom_cluster.routing.prompt_place import DISTURBANCE, PLACES, Side, compare

TABLE = ((10, 0.01), (1000, 1.0))
"""A millisecond per token."""
FAST = EngineSpeed(prompt_s=TABLE, chunk_tokens=1000)


def side(
    missing: int = 500, *, waiting: int = 0, decoding: int = 0, speed: EngineSpeed = FAST, **changed: object
) -> Side:
    for name, value in changed.items():
        speed = EngineSpeed(**{field: getattr(speed, field) for field in speed.__struct_fields__} | {name: value})
    return Side(speed=speed, num_waiting_tokens=waiting, num_missing_tokens=missing, num_decoding=decoding)


def test_both_times_follow_the_formulas() -> None:
    decode = side(500, waiting=1000, decoding=4, decode_step_s=0.02, handoff_s=((500, 0.05),))
    found = compare(decode, side(700, waiting=3000))
    assert found.remote_s == pytest.approx(3.7 + 0.05)
    assert found.local_s == pytest.approx(1.5 + 2 * 0.02 + DISTURBANCE * 4 * 0.5)
    assert found.place == "prefill_busy"


def test_prefill_gets_what_is_as_soon_there() -> None:
    assert compare(side(), side()).place == "remote"
    assert compare(side(decoding=100), side()).place == "remote"
    assert compare(side(waiting=3000), side(waiting=2000)).place == "remote"


def test_a_handoff_that_takes_longer_than_the_prompt_is_not_worth_it() -> None:
    slow = ((100, 0.2), (1000, 0.3))
    assert compare(side(100, handoff_s=slow), side(100)).place == "decode_sooner"
    assert compare(side(20, handoff_s=slow), side(20)).remote_s == pytest.approx(0.22)
    assert compare(side(10_000, handoff_s=slow), side(10_000)).place == "decode_sooner"
    assert compare(side(10_000, handoff_s=slow, decoding=50), side(10_000)).place == "remote"


def test_a_queue_sends_prompts_to_the_other_side() -> None:
    assert compare(side(), side(waiting=90)).place == "remote"
    assert compare(side(), side(waiting=110)).place == "prefill_busy"
    assert compare(side(waiting=60), side(waiting=60)).place == "remote"


def test_more_rows_bear_a_longer_queue_at_prefill() -> None:
    for rows, bearable in ((1, 100), (10, 1000), (100, 10000)):
        assert compare(side(decoding=rows), side(waiting=bearable - 10)).place == "remote"
        assert compare(side(decoding=rows), side(waiting=bearable + 10)).place == "prefill_busy"


def test_what_decode_has_cached_counts_for_it_and_what_prefill_has_for_prefill() -> None:
    assert compare(side(100), side(900)).place == "decode_sooner"
    assert compare(side(900), side(100)).place == "remote"


def test_chunks_that_must_be_small_beside_rows_that_decode_make_decode_slow() -> None:
    decode = side(decoding=1, decode_step_s=0.05, chunk_tokens=10)
    assert compare(decode, side(waiting=2000)).place == "remote"
    assert compare(replace(decode, num_decoding=0), side(waiting=2000)).place == "prefill_busy"


def test_while_nothing_is_known_prompts_go_to_prefill() -> None:
    unknown = EngineSpeed()
    found = compare(side(speed=unknown), side(speed=unknown, waiting=100_000))
    assert (found.place, found.local_s, found.remote_s) == ("remote", 0.0, 0.0)


def test_what_one_side_has_not_measured_is_taken_from_the_other() -> None:
    unknown = EngineSpeed(chunk_tokens=1000)
    assert compare(side(speed=unknown), side()).local_s == pytest.approx(0.5 * (1 + DISTURBANCE))
    assert compare(side(), side(speed=unknown)).remote_s == pytest.approx(0.5)


def test_the_others_table_is_used_at_the_own_level() -> None:
    half_as_fast = side(1000, prompt_s=((10, 0.02),))
    assert compare(half_as_fast, side(1000)).local_s == pytest.approx(2.0 * (1 + DISTURBANCE))
    assert compare(side(1000, prompt_s=((1, 0.5),)), side(1000)).local_s == pytest.approx(1.0 * (1 + DISTURBANCE))
    odd = side(1000, prompt_s=((10, 100.0),))
    assert compare(odd, side(1000)).local_s == pytest.approx(8.0 * (1 + DISTURBANCE))


_tables = st.lists(st.tuples(st.integers(1, 100_000), st.floats(0, 100)), max_size=5).map(
    lambda points: tuple(
        zip(sorted({size for size, _ in points}), sorted(seconds for _, seconds in points), strict=False)
    )
)
_sides = st.builds(
    Side,
    speed=st.builds(
        EngineSpeed,
        prompt_s=_tables,
        handoff_s=_tables,
        decode_step_s=st.floats(0, 10),
        chunk_tokens=st.integers(0, 10_000),
    ),
    num_waiting_tokens=st.integers(0, 10**7),
    num_missing_tokens=st.integers(1, 10**6),
    num_decoding=st.integers(0, 1000),
)


@settings(max_examples=300, deadline=None)
@given(_sides, _sides, st.integers(0, 10**6))
def test_any_tables_give_an_answer_and_a_longer_queue_at_prefill_never_brings_a_prompt_there(
    decode: Side, prefill: Side, more: int
) -> None:
    found = compare(decode, prefill)
    assert found.place in PLACES and 0 <= found.local_s < float("inf") and 0 <= found.remote_s < float("inf")
    busier = compare(decode, replace(prefill, num_waiting_tokens=prefill.num_waiting_tokens + more))
    if found.place != "remote" and not decode.speed.prompt_s:
        assert busier.place != "remote"
