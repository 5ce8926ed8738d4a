"""Whom a gate lets in, and when it tells others to come back, by a clock of the tests' own."""

from __future__ import annotations

import pytest

from atom_cluster.api.protection.gate import Gate, Visit
from atom_cluster.config.protection import ProtectionConfig
from atom_cluster.errors import Overloaded
from atom_cluster.observability.memory import MemoryMetrics
from tests.fakes import VirtualClock

POST = Visit(method="POST", target_bytes=20, headers=(), access="user", client="10.0.0.1")


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(1000.0)


def make(clock: VirtualClock, **config: object) -> Gate:
    return Gate(ProtectionConfig.model_validate(config), metrics=MemoryMetrics(), clock=clock)


async def test_who_comes_while_too_many_are_open_is_told_when_these_will_have_been_answered(
    clock: VirtualClock,
) -> None:
    gate = make(clock, max_open_requests=20)
    passes = [await gate.enter(POST) for _ in range(20)]
    for _ in range(40):
        clock.sleep(1.5)
        gate.close(passes.pop(0))
        passes.append(await gate.enter(POST))
    told = []
    for _ in range(50):
        with pytest.raises(Overloaded, match="20 requests are being answered") as caught:
            await gate.enter(POST)
        told.append(caught.value.retry_after_s)
    assert min(told) >= 15 and max(told) <= 30 and len({round(seconds) for seconds in told}) > 5


async def test_a_quiet_time_does_not_make_a_full_one_seem_slow(clock: VirtualClock) -> None:
    gate = make(clock, max_open_requests=4)
    for _ in range(50):
        one = await gate.enter(POST)
        clock.sleep(100.0)
        gate.close(one)
    passes = [await gate.enter(POST) for _ in range(4)]
    for _ in range(20):
        clock.sleep(0.1)
        gate.close(passes.pop(0))
        passes.append(await gate.enter(POST))
    with pytest.raises(Overloaded) as caught:
        await gate.enter(POST)
    assert caught.value.retry_after_s <= 2
