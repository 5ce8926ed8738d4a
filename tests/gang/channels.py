"""Both plan channels behind one interface, for the contract tests, and followers in processes that can be killed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any

from atom_cluster.gang.plan_channel import PlanReceiver, PlanSender
from atom_cluster.gang.shm_receiver import connect_shm
from atom_cluster.gang.shm_sender import ShmPlanSender
from atom_cluster.gang.shm_wire import ShmAddress
from atom_cluster.gang.zmq_channel import ZmqAddress, ZmqPlanSender, connect_zmq
from tests.processes import forking

KINDS = ("shm", "zmq")
RING_BYTES = 64 * 1024
SILENCE_S = 1.0
Address = ShmAddress | ZmqAddress


def open_sender(kind: str, ranks: Sequence[int], *, send_timeout_s: float = 20.0) -> tuple[PlanSender, Address]:
    if kind == "shm":
        shm = ShmPlanSender(tuple(ranks), send_timeout_s=send_timeout_s, ring_bytes=RING_BYTES)
        return shm, shm.address
    zmq = ZmqPlanSender(tuple(ranks), host="127.0.0.1", send_timeout_s=send_timeout_s, silence_s=SILENCE_S)
    return zmq, zmq.address


def connect(address: Address, rank: int, *, timeout_s: float = 10.0) -> PlanReceiver:
    if isinstance(address, ShmAddress):
        return connect_shm(address, rank=rank, timeout_s=timeout_s)
    return connect_zmq(address, rank=rank, timeout_s=timeout_s, silence_s=SILENCE_S)


def open_channel(
    kind: str, num_followers: int, *, send_timeout_s: float = 20.0
) -> tuple[PlanSender, list[PlanReceiver]]:
    """A channel whose ends are all in this process."""
    ranks = range(1, num_followers + 1)
    sender, address = open_sender(kind, ranks, send_timeout_s=send_timeout_s)
    with ThreadPoolExecutor(num_followers) as pool:
        receivers = [pool.submit(connect, address, rank) for rank in ranks]
        sender.accept(10.0)
        return sender, [receiver.result() for receiver in receivers]


def start_process(target: Any, *args: Any) -> BaseProcess:
    process = forking().Process(target=target, args=args, daemon=True)
    process.start()
    return process


def follow_and_count(address: Address, rank: int) -> None:
    """A follower that answers every frame with its length, until rank 0 is gone."""
    receiver = connect(address, rank)
    while True:
        frame = receiver.receive()
        assert frame is not None
        receiver.report(len(frame).to_bytes(8, "little"))


def follow_without_reading(address: Address, rank: int, pipe: Any) -> None:
    """A follower that is stuck in a step, as far as rank 0 can see. Says when it is connected."""
    receiver = connect(address, rank)
    pipe.send("connected")
    receiver.wait_until_gone()
    os._exit(7)


def lead_and_idle(kind: str, pipe: Any) -> None:
    """Rank 0 in a process of its own: hands out its address, then does nothing."""
    sender, address = open_sender(kind, [1])
    pipe.send(address)
    sender.accept(20.0)
    pipe.recv()
