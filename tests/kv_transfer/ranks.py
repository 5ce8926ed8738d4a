"""Ranks with KV memory for tests of transports and agents: here, or in a process that can be stopped and killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch

from atom_cluster.config.faults import FaultsConfig
from atom_cluster.kv_transfer.pieces import Piece
from atom_cluster.kv_transfer.protocol import KvRegion, KvTransport, ReadCompletion
from atom_cluster.kv_transfer.registry import TransportSettings, open_transport
from atom_cluster.kv_transfer.shared_memory import allocate_shared
from atom_cluster.units import Deadline
from tests.kv_transfer.ipc_stand_in import open_stand_in
from tests.kv_transfer.mori_io_stand_in import open_over_stand_in
from tests.processes import forking

SECRET = b"a secret of the cluster"
SMALL = (64, 200, 4096)
"""Bytes per block of the cache groups of a small rank."""
LARGE = (1 << 20,)
STAND_INS: dict[str, Callable[[TransportSettings], KvTransport]] = {"ipc": open_stand_in, "mori": open_over_stand_in}
"""Transports whose hardware may be absent, over something that stands in for it and memory of the CPU."""


def open_named(name: str, settings: TransportSettings) -> KvTransport:
    """A transport by its name, as `tcp`; `ipc/stand-in` is one over its stand-in, `tcp/cuda` one for memory of GPUs,
    `tcp/slow` one whose server is behind a relay."""
    plain, _, variant = name.partition("/")
    if variant == "slow":
        settings = replace(settings, faults=FaultsConfig(line_delay_s=0.02, line_mib_per_s=500))
    return STAND_INS[plain](settings) if variant == "stand-in" else open_transport(plain, settings)


def allocate_for(name: str, num_bytes: int, device_index: int = 0) -> torch.Tensor:
    """Zeroed memory that the transport of this name can export."""
    if name.endswith("/cuda"):
        return torch.zeros(num_bytes, dtype=torch.uint8, device=torch.device("cuda", device_index))
    return allocate_shared(num_bytes)


def settle(name: str, device_index: int = 0) -> None:
    """Wait for what was written to memory for this transport: reads order themselves with nothing."""
    if name.endswith("/cuda"):
        torch.cuda.synchronize(device_index)


def make_regions(
    *, num_blocks: int, block_bytes: tuple[int, ...], seed: int | None, name: str = "shm", device_index: int = 0
) -> tuple[KvRegion, ...]:
    """A region per cache group in memory for this transport; random with a seed, else zero. The last two interleave."""

    def allocate(size: int) -> torch.Tensor:
        return allocate_for(name, num_blocks * size, device_index).view(num_blocks, size)

    *alone, last = block_bytes
    regions = []
    for index, size in enumerate(alone[:-1]):
        regions.append(KvRegion(f"region {index}", allocate(size)))
    if alone:
        joint = allocate(alone[-1] + last)
        regions.append(KvRegion("left", joint[:, : alone[-1]]))
        regions.append(KvRegion("right", joint[:, alone[-1] :]))
    else:
        regions.append(KvRegion("only", allocate(last)))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for region in regions:
            region.blocks.copy_(torch.randint(0, 256, region.blocks.shape, dtype=torch.uint8, generator=generator))
    settle(name, device_index)
    return tuple(regions)


@dataclass
class Rank:
    """A rank of this process."""

    transport: KvTransport
    regions: tuple[KvRegion, ...]
    descriptor: bytes

    def read(
        self,
        read_id: int,
        peer: str,
        remote: tuple[int, ...],
        local: tuple[int, ...],
        group: int = 0,
        pieces: tuple[Piece, ...] | None = None,
    ) -> ReadCompletion:
        self.transport.start_read(read_id, peer, group, remote, local, Deadline.after(20), pieces)
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
    device_index: int = 0,
) -> Iterator[Rank]:
    regions = make_regions(
        num_blocks=num_blocks, block_bytes=block_bytes, seed=seed, name=name, device_index=device_index
    )
    transport = open_named(name, TransportSettings(rank=rank, host="127.0.0.1", secret=secret))
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
    name: str,
    *,
    num_blocks: int = 16,
    block_bytes: tuple[int, ...] = SMALL,
    seed: int = 7,
    rank: int = 0,
    device_index: int | None = None,
) -> Iterator[Exporter]:
    """The exporter in another process, which dies with the context at the latest. On the last GPU by default."""
    context = forking()
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_export, args=(theirs, name, num_blocks, block_bytes, seed, rank, device_index), daemon=True
    )
    process.start()
    theirs.close()
    try:
        assert ours.poll(200), "the exporter did not start"
        regions = make_regions(num_blocks=num_blocks, block_bytes=block_bytes, seed=seed, name=name)
        yield Exporter(ours.recv_bytes(), regions, process.pid)
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


def _export(
    connection: Connection,
    name: str,
    num_blocks: int,
    block_bytes: tuple[int, ...],
    seed: int,
    number: int,
    device_index: int | None,
) -> None:
    if device_index is None:
        device_index = torch.cuda.device_count() - 1 if name.endswith("/cuda") else 0
    with rank_here(
        name, num_blocks=num_blocks, block_bytes=block_bytes, seed=seed, rank=number, device_index=device_index
    ) as rank:
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
