"""An engine's messages reach the event loop, all of them and in order, however the two threads take turns."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from atom_cluster.engine.protocols import EngineOutput
from atom_cluster.engine_server.outbox import Destination, LinkOutbox
from atom_cluster.errors import ProtocolError
from atom_cluster.messages.transfer import TicketRenew


def message(number: int) -> TicketRenew:
    return TicketRenew((str(number),))


class Receiver:
    """What was delivered; raises `errors[message]` instead of taking that message."""

    def __init__(self) -> None:
        self.messages: list[EngineOutput] = []
        self.errors: dict[EngineOutput, Exception] = {}

    def take(self, destination: Destination, message: EngineOutput) -> None:
        assert destination == "peer"
        if message in self.errors:
            raise self.errors[message]
        self.messages.append(message)


@pytest.fixture
def rapid_thread_switches() -> Iterator[None]:
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before_s)


@pytest.mark.usefixtures("rapid_thread_switches")
async def test_messages_of_another_thread_arrive_in_order() -> None:
    receiver = Receiver()
    outbox = LinkOutbox(asyncio.get_running_loop(), receiver.take)

    def send_all() -> None:
        for number in range(5000):
            outbox.send("peer", message(number))

    await asyncio.to_thread(send_all)
    await asyncio.sleep(0)  # a turn for the last wake-up
    assert receiver.messages == [message(number) for number in range(5000)]


class InterruptedQueue(deque[tuple[Destination, EngineOutput]]):
    """Lets the other thread run just before something is appended."""

    def __init__(self, interrupt: Callable[[], None]) -> None:
        super().__init__()
        self._interrupt = interrupt

    def append(self, item: tuple[Destination, EngineOutput]) -> None:
        self._interrupt()
        super().append(item)


async def test_a_message_sent_just_as_the_queue_runs_empty_is_not_left_behind() -> None:
    receiver = Receiver()
    outbox = LinkOutbox(asyncio.get_running_loop(), receiver.take)
    outbox.send("peer", message(0))
    queue = InterruptedQueue(interrupt=outbox._flush)
    queue.extend(outbox._queue)
    outbox._queue = queue
    outbox.send("peer", message(1))
    await asyncio.sleep(0)
    assert receiver.messages == [message(0), message(1)]


async def test_several_messages_cost_one_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, receiver = asyncio.get_running_loop(), Receiver()
    wake_ups: list[Callable[..., object]] = []
    monkeypatch.setattr(loop, "call_soon_threadsafe", wake_ups.append)
    outbox = LinkOutbox(loop, receiver.take)
    for number in range(10):
        outbox.send("peer", message(number))
    assert len(wake_ups) == 1
    wake_ups[0]()
    assert len(receiver.messages) == 10


async def test_a_message_that_cannot_be_sent_is_skipped() -> None:
    receiver = Receiver()
    receiver.errors[message(0)] = ProtocolError("too large")
    outbox = LinkOutbox(asyncio.get_running_loop(), receiver.take)
    outbox.send("peer", message(0))
    outbox.send("peer", message(1))
    await asyncio.sleep(0)
    assert receiver.messages == [message(1)]


async def test_an_unforeseen_error_is_reported_and_what_follows_still_arrives() -> None:
    receiver, reported = Receiver(), list[BaseException]()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: reported.append(context["exception"]))
    receiver.errors[message(0)] = OSError("no more sockets")
    outbox = LinkOutbox(loop, receiver.take)
    for number in range(3):
        outbox.send("peer", message(number))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert receiver.messages == [message(1), message(2)]
    assert reported == [receiver.errors[message(0)]]


def test_messages_for_a_loop_that_is_closed_are_dropped() -> None:
    loop, receiver = asyncio.new_event_loop(), Receiver()
    loop.close()
    LinkOutbox(loop, receiver.take).send("peer", message(0))
    assert receiver.messages == []
