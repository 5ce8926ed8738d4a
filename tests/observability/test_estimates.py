"""Estimates of how long something takes: they follow what is observed, bend where it does, and are forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.observability.estimates import FORGET_S, TimesBySize, largest_within, seconds_of


def noted(*observations: tuple[int, float]) -> TimesBySize:
    times = TimesBySize()
    for size, seconds in observations:
        times.note(size, seconds, now_s=0.0)
    return times


def test_sizes_between_two_known_ones_are_on_the_line_between_them() -> None:
    points = noted((100, 1.0), (300, 2.0)).points(0.0)
    assert points == ((100, 1.0), (300, 2.0))
    assert [seconds_of(points, size) for size in (50, 100, 200, 300, 600)] == [0.5, 1.0, 1.5, 2.0, 4.0]


def test_a_flat_start_stays_flat() -> None:
    points = noted((1, 0.01), (16, 0.01), (64, 0.01), (4096, 0.08)).points(0.0)
    assert seconds_of(points, 40) == pytest.approx(0.01)
    assert seconds_of(points, 2080) == pytest.approx(0.045)


def test_an_estimate_follows_what_is_observed_and_no_single_outlier() -> None:
    times = noted(*[(100, 1.0)] * 20)
    times.note(100, 9.0, now_s=0.0)
    assert 1.0 < times.points(0.0)[0][1] <= 2.0
    for _ in range(40):
        times.note(100, 3.0, now_s=0.0)
    assert times.points(0.0)[0][1] == pytest.approx(3.0, rel=0.05)


def test_the_first_time_may_be_slow_and_does_not_count() -> None:
    assert noted((100, 30.0), (100, 1.0), (100, 1.1)).points(0.0) == ((100, 1.0),)


def test_what_was_not_seen_for_long_is_forgotten() -> None:
    times = noted((100, 5.0))
    times.note(1000, 6.0, now_s=FORGET_S)
    assert [size for size, _ in times.points(FORGET_S + 1)] == [1000]
    times.note(100, 1.0, now_s=FORGET_S + 2)
    assert times.points(FORGET_S + 2) == ((100, 1.0), (1000, 6.0))


def test_a_slow_first_time_of_a_small_size_says_nothing_about_larger_ones() -> None:
    assert noted((100, 30.0), (1000, 2.0), (5000, 3.0)).points(0.0) == ((100, 2.0), (1000, 2.0), (5000, 3.0))


def test_what_nothing_confirms_is_believed_less_and_less() -> None:
    times = noted((100, 8.0), (1000, 8.0))
    assert times.points(20.0, doubt_s=10.0) == ((100, 2.0), (1000, 2.0))
    times.note(100, 8.0, now_s=20.0)
    # The larger size is old, but takes no less than the smaller one.
    assert times.points(20.0, doubt_s=10.0) == ((100, 8.0), (1000, 8.0))
    assert times.points(20.0) == ((100, 8.0), (1000, 8.0))


_observations = st.lists(st.tuples(st.integers(1, 200_000), st.floats(1e-6, 1e3)), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(_observations, st.lists(st.integers(1, 1_000_000), min_size=2, max_size=20))
def test_more_never_takes_less_and_the_inverse_is_one(observations: list[tuple[int, float]], sizes: list[int]) -> None:
    points = noted(*observations).points(0.0)
    seconds = [seconds_of(points, size) for size in sorted(sizes)]
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in zip(seconds, seconds[1:]))
    for size in sizes:
        assert seconds_of(points, largest_within(points, seconds_of(points, size))) == pytest.approx(
            seconds_of(points, size)
        )
    assert len(points) <= 19
