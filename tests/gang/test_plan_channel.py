"""The contract of plan channels, on both of them."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from atom_cluster.errors import GangError
from atom_cluster.gang.plan_channel import PlanReceiver, PlanSender, ReportFrame
from atom_cluster.gang.shm_wire import TOKEN_BYTES, ShmAddress
from atom_cluster.gang.zmq_channel import ZmqAddress
from tests.gang import channels

Channel = tuple[PlanSender, list[PlanReceiver]]


@pytest.fixture(params=channels.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_channel(kind: str) -> Iterator[Callable[..., Channel]]:
    ends: list[PlanSender | PlanReceiver] = []

    def make(num_followers: int = 1, send_timeout_s: float = 20.0) -> Channel:
        sender, receivers = channels.open_channel(kind, num_followers, send_timeout_s=send_timeout_s)
        ends.extend([*receivers, sender])
        return sender, receivers

    yield make
    for end in ends:
        end.close()


def take_reports(sender: PlanSender, count: int) -> list[ReportFrame]:
    deadline_s = time.monotonic() + 10
    reports: list[ReportFrame] = []
    while len(reports) < count and time.monotonic() < deadline_s:
        reports += sender.take_reports()
        time.sleep(0.001)
    return reports


def wait_for_failure(sender: PlanSender) -> GangError:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        try:
            sender.take_reports()
        except GangError as exc:
            return exc
        time.sleep(0.01)
    raise AssertionError("the death of a follower was not noticed")


def test_every_follower_gets_every_frame_in_order_while_the_ring_wraps_many_times(
    open_channel: Callable[..., Channel],
) -> None:
    sender, receivers = open_channel(3)
    rng = random.Random(1)
    frames = [rng.randbytes(rng.choice((1, 7, 300, 4000, 16_384, 16_385))) for _ in range(300)]
    received: list[list[bytes]] = [[] for _ in receivers]

    def read(index: int) -> None:
        while len(received[index]) < len(frames):
            frame = receivers[index].receive(10.0)
            assert frame is not None
            received[index].append(frame)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(receivers))]
    for thread in threads:
        thread.start()
    for frame in frames:
        sender.send(frame)
    for thread in threads:
        thread.join(20)
    assert received == [frames] * 3


def test_a_frame_larger_than_the_ring_passes(open_channel: Callable[..., Channel]) -> None:
    sender, (receiver,) = open_channel()
    frame = random.Random(2).randbytes(10 * channels.RING_BYTES + 1)
    received: list[bytes | None] = []
    thread = threading.Thread(target=lambda: received.append(receiver.receive(10.0)))
    thread.start()
    sender.send(frame)
    thread.join(20)
    assert received == [frame]


def test_receive_gives_none_when_nothing_comes_in_time(open_channel: Callable[..., Channel]) -> None:
    _, (receiver,) = open_channel()
    assert receiver.receive(0.0) is None
    assert receiver.receive(0.05) is None


def test_reports_of_all_followers_arrive_with_their_rank(open_channel: Callable[..., Channel]) -> None:
    sender, receivers = open_channel(2)
    assert sender.take_reports() == []
    receivers[0].report(b"a" * 100_000)
    receivers[1].report(b"b")
    found = sorted(take_reports(sender, 2), key=lambda report: report.rank)
    assert found == [ReportFrame(1, b"a" * 100_000), ReportFrame(2, b"b")]


def test_a_sender_waits_for_a_slow_follower_and_loses_nothing(open_channel: Callable[..., Channel]) -> None:
    sender, (receiver,) = open_channel()
    frames = [bytes([number % 256]) * 40_000 for number in range(50)]
    thread = threading.Thread(target=lambda: [sender.send(frame) for frame in frames])
    thread.start()
    received = []
    for _ in frames:
        time.sleep(0.002)
        received.append(receiver.receive(10.0))
    thread.join(10)
    assert received == frames


def test_a_follower_that_never_reads_fails_the_send_and_is_named(open_channel: Callable[..., Channel]) -> None:
    sender, _ = open_channel(send_timeout_s=0.3)
    with pytest.raises(GangError, match="rank 1 has not read"):
        for _ in range(100):
            sender.send(bytes(1_000_000))


def test_both_ends_can_be_full_at_once_and_still_get_on(open_channel: Callable[..., Channel]) -> None:
    sender, (receiver,) = open_channel()
    num_frames = 40

    def work() -> None:
        for _ in range(num_frames):
            receiver.report(bytes(100_000))
            assert receiver.receive(10.0) is not None

    thread = threading.Thread(target=work)
    thread.start()
    reports: list[ReportFrame] = []
    for _ in range(num_frames):
        sender.send(bytes(60_000))
    reports = take_reports(sender, num_frames)
    thread.join(10)
    assert len(reports) == num_frames


def test_frames_sent_before_a_hang_up_are_still_read_and_then_it_is_an_error(
    open_channel: Callable[..., Channel],
) -> None:
    sender, (receiver,) = open_channel()
    sender.send(b"last words")
    sender.close()
    assert receiver.receive(10.0) == b"last words"
    with pytest.raises(GangError, match="rank 0 is gone"):
        receiver.receive(10.0)


def test_closing_a_follower_wakes_the_thread_that_watches(open_channel: Callable[..., Channel]) -> None:
    _, (receiver,) = open_channel()
    thread = threading.Thread(target=receiver.wait_until_gone)
    thread.start()
    receiver.close()
    thread.join(5)
    assert not thread.is_alive()


def test_close_is_idempotent(open_channel: Callable[..., Channel]) -> None:
    sender, (receiver,) = open_channel()
    for _ in range(2):
        receiver.close()
        sender.close()


def test_missing_followers_are_named(kind: str) -> None:
    sender, _ = channels.open_sender(kind, [1, 2])
    with pytest.raises(GangError, match=r"ranks \[1, 2\] did not connect"):
        sender.accept(0.05)
    sender.close()


def test_a_stranger_is_turned_away_and_does_not_count(kind: str) -> None:
    sender, address = channels.open_sender(kind, [1])
    if isinstance(address, ShmAddress):
        stranger: channels.Address = ShmAddress(name=address.name, token=bytes(TOKEN_BYTES))
    else:
        stranger = ZmqAddress(plans=address.plans, pulse=address.pulse, secret=bytes(32))
    with ThreadPoolExecutor() as pool:
        accepting = pool.submit(sender.accept, 10.0)
        with pytest.raises(GangError):
            channels.connect(stranger, 1, timeout_s=0.5)
        assert not accepting.done()
        receiver = channels.connect(address, 1)
        accepting.result()
    sender.send(b"plan")
    assert receiver.receive(10.0) == b"plan"
    receiver.close()
    sender.close()


def test_a_killed_follower_is_noticed_after_its_reports_were_taken(kind: str) -> None:
    sender, address = channels.open_sender(kind, [1])
    process = channels.start_process(channels.follow_and_count, address, 1)
    sender.accept(20.0)
    sender.send(b"12345")
    assert take_reports(sender, 1) == [ReportFrame(1, (5).to_bytes(8, "little"))]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert "rank 1 is gone" in str(wait_for_failure(sender))
    with pytest.raises(GangError, match="rank 1 is gone"):
        for _ in range(100):
            sender.send(bytes(100_000))
    sender.close()


def test_a_killed_rank_0_is_noticed_even_by_a_follower_that_is_stuck(kind: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    leader = channels.start_process(channels.lead_and_idle, kind, theirs)
    follower_end, far_end = multiprocessing.Pipe()
    stuck = channels.start_process(channels.follow_without_reading, ours.recv(), 1, far_end)
    assert follower_end.recv() == "connected"
    assert stuck.is_alive()
    assert leader.pid is not None
    os.kill(leader.pid, signal.SIGKILL)
    stuck.join(10)
    assert stuck.exitcode == 7
