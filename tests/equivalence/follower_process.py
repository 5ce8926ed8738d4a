"""A follower in a process of its own. Apart from the tests, so that the process imports no transformers."""

from __future__ import annotations

from multiprocessing.connection import Connection

from atom_cluster.gang.follower import Follower
from atom_cluster.gang.shm_receiver import connect_shm
from atom_cluster.gang.shm_wire import ShmAddress
from atom_cluster.gang.step_clock import StepClock
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions


def run_follower(options: RunnerOptions, address: ShmAddress, pipe: Connection) -> None:
    runner = build_model_runner(options)
    pipe.send(runner.info)
    receiver = connect_shm(address, rank=options.rank, timeout_s=30.0)
    Follower(runner, receiver, StepClock()).run()
    runner.close()
