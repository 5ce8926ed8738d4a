"""A gang on this host without Ray: rank 0 in this process, the others in processes of their own. For `LLMEngine`.

Followers end with rank 0's process, whatever becomes of it. Knows no requests and no sockets of clients.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import multiprocessing.connection
import os
import socket
import threading
import time
from multiprocessing.context import SpawnProcess
from typing import cast

from atom_cluster.engine.local_runner import LocalRunner, merge_rank_infos
from atom_cluster.engine.protocols import StepRunner
from atom_cluster.errors import GangError
from atom_cluster.gang import wire
from atom_cluster.gang.follower import EXIT_LEADERLESS, LEAVE_S, Follower
from atom_cluster.gang.gang_runner import GangRunner
from atom_cluster.gang.plan_channel import PlanReceiver
from atom_cluster.gang.shm_receiver import connect_shm
from atom_cluster.gang.shm_sender import ShmPlanSender
from atom_cluster.gang.shm_wire import ShmAddress
from atom_cluster.gang.step_clock import StepClock
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions

_log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_JOIN_S = 600.0
_SEND_S = 60.0


def open_local_gang(options: RunnerOptions, num_ranks: int) -> StepRunner:
    """The runner of a gang of `num_ranks`, each on the GPU of its number, or all on CPUs. Owns the processes.

    Raises what a rank's start raises; GangError when a follower does not come up.
    """
    if num_ranks == 1:
        return LocalRunner(build_model_runner(options))
    options = dataclasses.replace(options, world_size=num_ranks, init_method=f"tcp://{_HOST}:{_free_port()}")
    ranks = range(1, num_ranks)
    sender = ShmPlanSender(tuple(ranks), send_timeout_s=_SEND_S)
    spawn = multiprocessing.get_context("spawn")
    followers = [
        spawn.Process(
            target=_follow, args=(_options_of(options, rank), sender.address), name=f"rank-{rank}", daemon=True
        )
        for rank in ranks
    ]
    for follower in followers:
        follower.start()
    watch = threading.Thread(target=_log_deaths, args=(followers,), daemon=True)
    watch.start()
    runner = build_model_runner(options)
    try:
        sender.accept(_JOIN_S)
    except GangError:
        runner.close()
        raise
    return GangRunner(
        info=merge_rank_infos([runner.info]),
        local=LocalRunner(runner),
        poll_local_kv=runner.poll_kv,
        sender=sender,
    )


def _options_of(options: RunnerOptions, rank: int) -> RunnerOptions:
    return dataclasses.replace(options, rank=rank, device_index=rank)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _log_deaths(followers: list[SpawnProcess]) -> None:
    """Say when a follower dies; while the gang comes up, rank 0 waits for it in a collective."""
    running = {follower.sentinel: follower for follower in followers}
    while running:
        for sentinel in multiprocessing.connection.wait(running):
            follower = running.pop(cast("int", sentinel))
            follower.join()
            if follower.exitcode != 0:  # None while another thread is about to note it: it has ended all the same
                _log.error("%s ended with status %s", follower.name, follower.exitcode)


def _follow(options: RunnerOptions, address: ShmAddress) -> None:
    """A follower's process."""
    runner = build_model_runner(options)
    receiver = connect_shm(address, rank=options.rank, timeout_s=_JOIN_S)
    threading.Thread(target=_watch, args=(receiver,), daemon=True).start()
    try:
        Follower(runner, receiver, StepClock()).run()
    except Exception as exc:
        receiver.report(wire.encode(wire.RankFailed(f"{type(exc).__name__}: {exc}")))
        raise
    runner.close()
    os._exit(0)  # the watch has nothing to say any more


def _watch(receiver: PlanReceiver) -> None:
    """End this process when rank 0 is gone: a step that waits for it may never return."""
    receiver.wait_until_gone()
    time.sleep(LEAVE_S)
    os._exit(EXIT_LEADERLESS)
