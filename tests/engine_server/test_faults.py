"""Deliberate faults of messages: lost, repeated and late ones, and only those between engines."""

from __future__ import annotations

import asyncio

import pytest

from atom_cluster.config.faults import FaultsConfig
from atom_cluster.engine.protocols import EngineOutput
from atom_cluster.engine_server.faults import FaultyDelivery
from atom_cluster.engine_server.outbox import Destination
from atom_cluster.messages.requests import TokenBatch
from atom_cluster.messages.transfer import TicketRelease

NUM_MESSAGES = 2000


class Delivered:
    """What arrived."""

    def __init__(self) -> None:
        self.messages: list[EngineOutput] = []

    def __call__(self, destination: Destination, message: EngineOutput) -> None:
        assert destination == "peer"
        self.messages.append(message)


async def deliver(faults: FaultsConfig, messages: list[EngineOutput]) -> list[EngineOutput]:
    delivered = Delivered()
    faulty = FaultyDelivery(delivered, faults, loop=asyncio.get_running_loop(), name="decode-1")
    for message in messages:
        faulty("peer", message)
    await asyncio.sleep(2 * faults.delay_messages_s)
    return delivered.messages


def releases() -> list[EngineOutput]:
    return [TicketRelease((str(number),)) for number in range(NUM_MESSAGES)]


async def test_a_share_of_messages_is_lost() -> None:
    arrived = await deliver(FaultsConfig(lose_messages=0.25), releases())
    assert 0.2 < 1 - len(arrived) / NUM_MESSAGES < 0.3


async def test_a_share_of_messages_comes_twice() -> None:
    arrived = await deliver(FaultsConfig(repeat_messages=0.25), releases())
    assert 0.2 < len(arrived) / NUM_MESSAGES - 1 < 0.3
    assert set(arrived) == set(releases())


async def test_late_messages_all_come_and_overtake_each_other() -> None:
    sent = releases()[:50]
    arrived = await deliver(FaultsConfig(delay_messages_s=0.1), sent)
    assert set(arrived) == set(sent) and arrived != sent


@pytest.mark.parametrize("faults", [FaultsConfig(lose_messages=0.99), FaultsConfig(delay_messages_s=9.0)])
async def test_tokens_are_never_touched(faults: FaultsConfig) -> None:
    delivered = Delivered()
    FaultyDelivery(delivered, faults, loop=asyncio.get_running_loop(), name="e")("peer", TokenBatch(()))
    assert delivered.messages == [TokenBatch(())]


async def test_the_same_seed_and_engine_lose_the_same_messages() -> None:
    faults = FaultsConfig(lose_messages=0.5, seed=7)
    assert await deliver(faults, releases()) == await deliver(faults, releases())
