"""Time counts while this process looks at it, and hardly while it does not."""

from __future__ import annotations

import pytest

from atom_cluster.link.lived_time import LivedTime
from tests.fakes import VirtualClock


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1000.0)


def test_who_looks_often_enough_lives_all_of_it(clock: VirtualClock) -> None:
    lived = LivedTime(1.0, clock)
    for _ in range(20):
        clock.sleep(0.7)
        lived.look()
    clock.sleep(0.5)
    assert lived.now_s == pytest.approx(14.5)


def test_a_gap_counts_as_one_period_however_long_it_is(clock: VirtualClock) -> None:
    lived = LivedTime(1.0, clock)
    clock.sleep(0.5)
    lived.look()
    clock.sleep(600.0)
    assert lived.now_s == pytest.approx(1.5), "as long as nobody looks, too"
    assert lived.look() == pytest.approx(1.5)
    clock.sleep(0.25)
    assert lived.now_s == pytest.approx(1.75)


def test_who_is_short_of_time_all_the_time_lives_one_period_a_look(clock: VirtualClock) -> None:
    lived = LivedTime(1.0, clock)
    for _ in range(5):
        clock.sleep(3.0)
        lived.look()
    assert lived.now_s == pytest.approx(5.0)
