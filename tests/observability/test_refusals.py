"""Refusals are told at once, then once a period, and none is left out of the counts."""

from __future__ import annotations

import logging

import pytest

from atom_cluster.observability.refusals import RefusalLog

LOGGER = logging.getLogger("atom_cluster.test_refusals")


class Clock:
    at_s = 0.0

    def __call__(self) -> float:
        return self.at_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> RefusalLog:
    return RefusalLog(LOGGER, "visitors", period_s=10.0, clock=clock)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_the_first_is_told_at_once(log: RefusalLog, caplog: pytest.LogCaptureFixture) -> None:
    log.note("10.0.0.9", "no ticket")
    assert lines(caplog) == ["refused visitors: 1, the last from 10.0.0.9: 1 x no ticket"]
    assert not log.is_pending


def test_the_others_are_told_together_when_the_period_is_over(
    log: RefusalLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1000):
        log.note(f"10.0.0.{number % 7}", "no ticket" if number % 4 else "drunk")
        log.flush()
    assert len(lines(caplog)) == 1 and log.is_pending
    clock.at_s = 10.0
    log.flush()
    log.flush()
    assert lines(caplog)[1:] == ["refused visitors: 999, the last from 10.0.0.5: 750 x no ticket, 249 x drunk"]


def test_reasons_without_number_are_counted_together(
    log: RefusalLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(10_000):
        log.note("10.0.0.9", f"reason {number}")
    clock.at_s = 10.0
    log.flush()
    assert len(lines(caplog)[-1]) < 1000
    assert "refused visitors: 9999" in lines(caplog)[-1] and "9983 x other reasons" in lines(caplog)[-1]


def test_whose_address_is_not_known_is_counted_all_the_same(log: RefusalLog, caplog: pytest.LogCaptureFixture) -> None:
    log.note(None, "no ticket")
    assert lines(caplog) == ["refused visitors: 1: 1 x no ticket"]


def test_nothing_is_told_when_there_was_nothing(
    log: RefusalLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    clock.at_s = 100.0
    log.flush()
    assert lines(caplog) == []
