"""Who finds a queue full is told to come back when it will have emptied, not all at once, and never much too late."""

from __future__ import annotations

from random import Random

import pytest

from atom_cluster.observability.departures import LONGEST_S, SHORTEST_S, Departures
from tests.fakes import VirtualClock


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1000.0)


@pytest.fixture
def departures(clock: VirtualClock) -> Departures:
    return Departures(clock, random=Random(7))


def told(departures: Departures, num_ahead: int, num_times: int = 200) -> tuple[float, float]:
    """The shortest and the longest time that so many are told."""
    times = [departures.retry_after_s(num_ahead) for _ in range(num_times)]
    return min(times), max(times)


def leave(departures: Departures, clock: VirtualClock, every_s: float, num: int = 50, *, is_busy: bool = True) -> None:
    for _ in range(num):
        clock.sleep(every_s)
        departures.note(is_busy=is_busy)


@pytest.mark.parametrize(("every_s", "num_ahead"), [(0.1, 100), (0.5, 64), (2.0, 8), (0.01, 2000)])
def test_it_is_the_time_in_which_those_ahead_leave_or_a_part_of_its_second_half(
    departures: Departures, clock: VirtualClock, every_s: float, num_ahead: int
) -> None:
    leave(departures, clock, every_s)
    shortest_s, longest_s = told(departures, num_ahead)
    whole_s = every_s * num_ahead
    assert whole_s / 2 <= shortest_s < 0.6 * whole_s and 0.9 * whole_s < longest_s <= 1.001 * whole_s


def test_requests_that_end_together_leave_at_the_pace_of_all(departures: Departures, clock: VirtualClock) -> None:
    for _ in range(10):
        clock.sleep(4.0)
        for _ in range(16):
            departures.note(is_busy=True)
    # 16 in 4 s, so 64 take 16 s. Right behind a batch it seems up to e times as fast.
    assert told(departures, 64)[0] > 16 / 2.8 / 2 and told(departures, 64)[1] < 17


def test_it_is_bounded_both_ways(departures: Departures, clock: VirtualClock) -> None:
    leave(departures, clock, 0.001)
    assert told(departures, 1)[0] >= SHORTEST_S and told(departures, 1)[1] <= 2 * SHORTEST_S
    leave(departures, clock, 30.0)
    assert told(departures, 1000)[0] >= LONGEST_S / 2 and told(departures, 1000)[1] <= LONGEST_S


def test_nothing_has_left_yet_is_as_long_again(departures: Departures, clock: VirtualClock) -> None:
    assert told(departures, 500)[1] <= 2 * SHORTEST_S
    clock.sleep(20.0)
    assert told(departures, 500)[0] >= 10.0 and told(departures, 500)[1] <= 20.0


def test_time_in_which_nobody_waited_says_nothing_of_the_pace(departures: Departures, clock: VirtualClock) -> None:
    leave(departures, clock, 0.1)
    leave(departures, clock, 0.1, 1, is_busy=False)
    leave(departures, clock, 600.0, 5, is_busy=False)
    assert told(departures, 100)[1] <= 10.1


def test_a_queue_that_stands_still_is_noticed(departures: Departures, clock: VirtualClock) -> None:
    leave(departures, clock, 0.1)
    told(departures, 20)
    clock.sleep(40.0)
    assert told(departures, 20)[0] >= 20 * 40.0 / 16 / 2


def test_a_queue_that_gets_faster_is_noticed(departures: Departures, clock: VirtualClock) -> None:
    leave(departures, clock, 5.0)
    leave(departures, clock, 0.1, 100)
    assert told(departures, 50)[1] < 6.0
