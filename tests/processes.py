"""Processes of the tests' own: forked off one that has imported torch and the library, so that they start at once.

That one is started on first use, has no threads and has touched no device; a child inherits nothing of a test's.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch.multiprocessing

T = TypeVar("T")
_PRELOADED = ("pytest", "atom_cluster.runner.build", "atom_cluster.kv_transfer.agent", "tests.kv_transfer.ranks")


def forking() -> multiprocessing.context.ForkServerContext:
    """Makes processes and pipes. What a process runs, and its arguments, have to be importable and picklable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def call_elsewhere(function: Callable[..., T], *arguments: object) -> T:
    """What the function returns in another process. Raises what it raises."""
    with ProcessPoolExecutor(1, mp_context=forking()) as pool:
        return pool.submit(function, *arguments).result()


def run_ranks(target: Callable[..., None], *arguments: object, num_ranks: int) -> None:
    """`target(rank, *arguments)` in a process for each rank, until all have ended. Raises what one of them raises."""
    forking()
    torch.multiprocessing.start_processes(target, args=arguments, nprocs=num_ranks, start_method="forkserver")
