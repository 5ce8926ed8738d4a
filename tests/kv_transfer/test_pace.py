from __future__ import annotations

import pytest

from atom_cluster.kv_transfer import pace
from atom_cluster.kv_transfer.pace import PollPace

POLL_S = 0.00002
"""Takes a poll itself."""


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


@pytest.mark.parametrize("read_s", [0.00004, 0.0001, 0.001, 0.004, 0.1])
def test_an_end_is_seen_soon_compared_with_what_was_waited_for(clock: Clock, read_s: float) -> None:
    poll_pace, begin_s, num_polls = PollPace(), clock.now_s, 0
    while clock.now_s < begin_s + read_s:
        clock.now_s += POLL_S + poll_pace.pause_s
        num_polls += 1
    late_s = clock.now_s - begin_s - read_s
    assert late_s <= POLL_S + read_s / 32
    assert num_polls <= 100 + read_s / 0.0005


def test_whoever_waits_for_long_asks_two_thousand_times_a_second(clock: Clock) -> None:
    poll_pace = PollPace()
    clock.now_s += 3600
    assert poll_pace.pause_s == 0.0005
    poll_pace.restart()
    assert poll_pace.pause_s == 0.0
