"""Ranks with KV memory for tests of transports and agents: here, or in a process that can be stopped and killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from atom_cluster.kv_transfer.protocol import KvRegion, KvTransport, ReadCompletion
from atom_cluster.kv_transfer.registry import TransportSettings, open_transport
from atom_cluster.kv_transfer.shared_memory import allocate_shared
from atom_cluster.units import Deadline

SECRET = b"a secret of the cluster"
SMALL = (64, 200, 4096)
"""Bytes per block of the cache groups of a small rank."""
LARGE = (1 << 20,)


def make_regions(*, num_blocks: int, block_bytes: tuple[int, ...], seed: int | None) -> tuple[KvRegion, ...]:
    """A region per cache group in shared memory; random with a seed, else zero. The last two interleave."""
    *alone, last = block_bytes
    regions = []
    for index, size in enumerate(alone[:-1]):
        regions.append(KvRegion(f"region {index}", allocate_shared(num_blocks * size).view(num_blocks, size)))
    if alone:
        joint = allocate_shared(num_blocks * (alone[-1] + last)).view(num_blocks, -1)
        regions.append(KvRegion("left", joint[:, : alone[-1]]))
        regions.append(KvRegion("right", joint[:, alone[-1] :]))
    else:
        regions.append(KvRegion("only", allocate_shared(num_blocks * last).view(num_blocks, last)))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for region in regions:
            region.blocks.copy_(torch.randint(0, 256, region.blocks.shape, dtype=torch.uint8, generator=generator))
    return tuple(regions)


@dataclass
class Rank:
    """A rank of this process."""

    transport: KvTransport
    regions: tuple[KvRegion, ...]
    descriptor: bytes

    def read(
        self, read_id: int, peer: str, remote: tuple[int, ...], local: tuple[int, ...], group: int = 0
    ) -> ReadCompletion:
        self.transport.start_read(read_id, peer, group, remote, local, Deadline.after(20))
        (completion,) = wait_for(self.transport, 1)
        return completion


@contextmanager
def rank_here(
    name: str,
    *,
    num_blocks: int = 16,
    block_bytes: tuple[int, ...] = SMALL,
    seed: int | None = None,
    rank: int = 0,
    secret: bytes = SECRET,
) -> Iterator[Rank]:
    regions = make_regions(num_blocks=num_blocks, block_bytes=block_bytes, seed=seed)
    transport = open_transport(name, TransportSettings(rank=rank, host="127.0.0.1", secret=secret))
    try:
        yield Rank(transport, regions, transport.export(regions))
    finally:
        transport.close()


@dataclass
class Exporter:
    """A rank that only exports; `pid` is None when it lives in this process."""

    descriptor: bytes
    regions: tuple[KvRegion, ...]
    """Equal content, in this process's own memory if the exporter is another process."""
    pid: int | None

    def signal(self, number: signal.Signals) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)


@contextmanager
def exporter_elsewhere(
    name: str, *, num_blocks: int = 16, block_bytes: tuple[int, ...] = SMALL, seed: int = 7
) -> Iterator[Exporter]:
    """The exporter in another process, which dies with the context at the latest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kv_transfer.ranks", "atom_cluster.kv_transfer.agent"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_export, args=(theirs, name, num_blocks, block_bytes, seed), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(60), "the exporter did not start"
        regions = make_regions(num_blocks=num_blocks, block_bytes=block_bytes, seed=seed)
        yield Exporter(ours.recv_bytes(), regions, process.pid)
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def _export(connection: Connection, name: str, num_blocks: int, block_bytes: tuple[int, ...], seed: int) -> None:
    with rank_here(name, num_blocks=num_blocks, block_bytes=block_bytes, seed=seed) as rank:
        connection.send_bytes(rank.descriptor)
        connection.poll(None)


def wait_for(transport: KvTransport, count: int, timeout_s: float = 30) -> list[ReadCompletion]:
    """The next `count` completions."""
    completions: list[ReadCompletion] = []

    def has_all() -> bool:
        completions.extend(transport.poll())
        return len(completions) >= count

    wait_until(has_all, timeout_s)
    return completions


def wait_until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    """Poll until the condition holds; fails the test when it does not in time."""
    deadline = Deadline.after(timeout_s)
    while not condition():
        assert not deadline.has_passed, "waited in vain"
        time.sleep(0.001)
