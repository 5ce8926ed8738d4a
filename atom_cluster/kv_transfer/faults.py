"""FaultyTransport: a KV transport whose reads bring damaged blocks, or take longer, as `faults` configures."""

from __future__ import annotations

import random
import time
from collections import deque

import torch

from atom_cluster.config.faults import FaultsConfig
from atom_cluster.kv_transfer.pieces import PeerShape, Piece
from atom_cluster.kv_transfer.protocol import KvRegion, KvTransport, ReadCompletion
from atom_cluster.units import Deadline


class FaultyTransport:
    """A `KvTransport` around another one."""

    def __init__(self, transport: KvTransport, faults: FaultsConfig, *, rank: int) -> None:
        self.name = transport.name
        self._transport = transport
        self._faults = faults
        self._random = random.Random(f"{faults.seed}/{rank}")
        self._regions: tuple[KvRegion, ...] = ()
        self._targets: dict[int, tuple[int, tuple[int, ...], tuple[Piece, ...] | None]] = {}
        """Group, local blocks and pieces of the reads under way."""
        self._held: deque[tuple[float, ReadCompletion]] = deque()
        """What is over but not told yet: when to tell, in order."""

    def export(self, regions: tuple[KvRegion, ...]) -> bytes:
        """See `KvTransport`."""
        self._regions = regions
        return self._transport.export(regions)

    def connect(self, peer: str, descriptor: bytes, shape: PeerShape | None = None) -> None:
        """See `KvTransport`."""
        self._transport.connect(peer, descriptor, shape)

    def start_read(
        self,
        read_id: int,
        peer: str,
        group: int,
        remote_blocks: tuple[int, ...],
        local_blocks: tuple[int, ...],
        deadline: Deadline,
        pieces: tuple[Piece, ...] | None = None,
    ) -> None:
        """See `KvTransport`."""
        self._targets[read_id] = (group, local_blocks, pieces)
        self._transport.start_read(read_id, peer, group, remote_blocks, local_blocks, deadline, pieces)

    def poll(self) -> list[ReadCompletion]:
        """See `KvTransport`."""
        now_s = time.monotonic()
        for completion in self._transport.poll():
            group, blocks, pieces = self._targets.pop(completion.read_id)
            if completion.error is None and blocks and self._random.random() < self._faults.corrupt_reads:
                _damage(self._regions[group].blocks[self._random.choice(blocks)], pieces)
            self._held.append((now_s + self._faults.delay_reads_s, completion))
        due = []
        while self._held and self._held[0][0] <= now_s:
            due.append(self._held.popleft()[1])
        return due

    def disconnect(self, peer: str) -> None:
        """See `KvTransport`."""
        self._transport.disconnect(peer)

    def close(self) -> None:
        """See `KvTransport`."""
        self._transport.close()


def _damage(block: torch.Tensor, pieces: tuple[Piece, ...] | None) -> None:
    """Flip the lowest bit of every byte of the middle word of what was read, as a bad line would."""
    data = block.view(torch.uint8).flatten()
    if pieces is not None:
        read = pieces[len(pieces) // 2].local
        data = data[read.offset : read.offset + read.num_bytes]
    middle = len(data) // 16 * 8
    data[middle : middle + 8] ^= 1
