"""Members announce themselves for as long as they live, whatever ails the router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from atom_cluster.messages.cluster import Membership
from atom_cluster.serving import membership
from atom_cluster.serving.membership import Announcer
from tests.serving.conftest import ROUTER, FakeRouterHandle, engine_card, eventually


@pytest.fixture
async def make(router_handle: FakeRouterHandle) -> AsyncIterator[Callable[..., Announcer]]:
    """Makes announcers, and stops them at the end."""
    made: list[Announcer] = []

    def make_one(**values: object) -> Announcer:
        arguments = {"router": router_handle, "card": engine_card, "period_s": 0.01, **values}
        made.append(Announcer(**arguments))  # type: ignore[arg-type]
        return made[-1]

    yield make_one
    for announcer in made:
        await announcer.stop()


async def test_a_member_announces_itself_at_once_and_again(
    make: Callable[..., Announcer], router_handle: FakeRouterHandle
) -> None:
    make(period_s=3600.0).start()
    await eventually(lambda: len(router_handle.cards) == 1)
    make().start()
    await eventually(lambda: len(router_handle.cards) >= 5)


async def test_every_answer_is_handed_on(make: Callable[..., Announcer]) -> None:
    answers: list[Membership] = []
    make(on_membership=answers.append).start()
    await eventually(lambda: len(answers) >= 3)
    assert answers[0] == Membership(router=ROUTER, members=())


async def test_a_router_that_fails_or_says_nothing_is_asked_again(
    make: Callable[..., Announcer], router_handle: FakeRouterHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "_ANSWER_TIMEOUT_S", 0.02)
    answers: list[Membership] = []
    good, router_handle.answer = router_handle.answer, RuntimeError("no replica")
    make(on_membership=answers.append).start()
    await eventually(lambda: len(router_handle.cards) >= 3)
    router_handle.answer = None
    num_cards = len(router_handle.cards)
    await eventually(lambda: len(router_handle.cards) >= num_cards + 3)
    assert answers == []
    router_handle.answer = good
    await eventually(lambda: len(answers) >= 2)


async def test_an_answer_of_another_kind_is_an_error(
    make: Callable[..., Announcer], router_handle: FakeRouterHandle
) -> None:
    router_handle.answer = "hello"
    with pytest.raises(TypeError, match="str"):
        await make().announce_now()


async def test_starting_twice_is_starting_once(make: Callable[..., Announcer], router_handle: FakeRouterHandle) -> None:
    announcer = make(period_s=3600.0)
    announcer.start()
    announcer.start()
    await eventually(lambda: bool(router_handle.cards))
    await asyncio.sleep(0.02)
    assert len(router_handle.cards) == 1


async def test_a_stopped_member_is_silent_until_it_starts_again(
    make: Callable[..., Announcer], router_handle: FakeRouterHandle
) -> None:
    announcer = make()
    announcer.start()
    await eventually(lambda: bool(router_handle.cards))
    await announcer.stop()
    await announcer.stop()
    num_cards = len(router_handle.cards)
    await asyncio.sleep(0.05)
    assert len(router_handle.cards) == num_cards
    announcer.start()
    await eventually(lambda: len(router_handle.cards) > num_cards)


@pytest.mark.parametrize("num_turns", range(5))
async def test_stopping_just_as_the_router_answers_stops(
    make: Callable[..., Announcer], router_handle: FakeRouterHandle, num_turns: int
) -> None:
    answer: asyncio.Future[Membership] = asyncio.get_running_loop().create_future()
    router_handle.announce.remote = lambda card: answer  # type: ignore[method-assign, assignment, return-value]
    announcer = make()
    announcer.start()
    await asyncio.sleep(0.01)
    answer.set_result(Membership(router=ROUTER, members=()))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    stopping = asyncio.create_task(announcer.stop())
    await asyncio.wait((stopping,), timeout=20.0)
    assert stopping.done()


async def test_withdrawing_tells_the_router_and_stops(
    make: Callable[..., Announcer], router_handle: FakeRouterHandle
) -> None:
    announcer = make()
    announcer.start()
    await eventually(lambda: bool(router_handle.cards))
    await announcer.withdraw()
    num_cards = len(router_handle.cards)
    await asyncio.sleep(0.05)
    assert router_handle.withdrawn == [engine_card().address] and len(router_handle.cards) == num_cards


@pytest.mark.parametrize("answer", [RuntimeError("no replica"), None])
async def test_withdrawing_from_a_router_that_is_away_is_no_error(
    make: Callable[..., Announcer],
    router_handle: FakeRouterHandle,
    monkeypatch: pytest.MonkeyPatch,
    answer: object,
) -> None:
    monkeypatch.setattr(membership, "_ANSWER_TIMEOUT_S", 0.02)
    router_handle.answer = answer
    await make().withdraw()
    assert len(router_handle.withdrawn) == 1
