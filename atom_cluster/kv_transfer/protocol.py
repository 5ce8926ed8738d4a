"""KvTransport: the seam behind which shm, tcp, nixl, ipc and mori are interchangeable. One instance per rank.

Reading, not writing: only the owner of memory ever writes to it. So an engine may free the destination blocks of an
aborted request as soon as its own reads have drained, and a peer that dies cannot scribble over anybody.

Who frees what: the transport owns connections, mappings and staging buffers and frees them in `close` (idempotent).
KV memory belongs to the runner and must outlive the transport. Destination blocks of a read belong to the transport
from `start_read` until `poll` returned its completion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from atom_cluster.kv_transfer.pieces import PeerShape, Piece
from atom_cluster.units import Deadline


@dataclass(frozen=True, slots=True)
class KvRegion:
    """Memory of one cache group on one rank: a tensor whose dim 0 counts blocks and whose other dims are one block.

    A runner exports one region per group, in order of the groups; block i of group g is `regions[g].blocks[i]`, which
    is contiguous.
    """

    name: str
    blocks: torch.Tensor

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in this region."""
        return self.blocks[0].numel() * self.blocks.element_size()


@dataclass(frozen=True, slots=True)
class ReadCompletion:
    """End of one read. With an `error`, the destination blocks hold garbage."""

    read_id: int
    error: str | None
    num_bytes: int
    seconds: float


class KvTransport(Protocol):
    """Copies blocks out of other ranks' KV memory. Called from one thread; no method blocks long."""

    name: str

    def export(self, regions: tuple[KvRegion, ...]) -> bytes:
        """Make these regions readable by peers; called once. Returns what a peer's `connect` takes.

        Raises `TransferError` when the memory cannot be exported this way (for instance GPU memory through shm).
        """
        ...

    def connect(self, peer: str, descriptor: bytes, shape: PeerShape | None = None) -> None:
        """Prepare reads from `peer`, one rank of another engine. Idempotent.

        Without `shape` it is to be of this rank's number, with blocks as large as ours. Raises `TransferError` if the
        descriptor says otherwise.
        """
        ...

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
        """Start copying remote block i of a group into local block i. Ends with exactly one completion.

        With `pieces`, only these of each block are copied, and nothing else of the local ones is touched; without,
        whole blocks, which must be equally large on both sides. Several reads into different pieces of a block may be
        under way together.
        """
        ...

    def poll(self) -> list[ReadCompletion]:
        """Reads that ended since the last call; one past its deadline ends with an error, and writes nothing after."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forget a peer; its reads under way complete with an error. Unknown peers are ignored."""
        ...

    def close(self) -> None:
        """Disconnect everybody and free what was allocated. Idempotent."""
        ...
