"""How a read is cut for MORI-IO: regions into registered chunks, blocks into runs, runs into batches.

Pure arithmetic of blocks and bytes; knows no engine, no transfer and no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.pieces import Piece
from atom_cluster.kv_transfer.regions import adjacent_runs
from atom_cluster.units import GiB, KiB, MiB, ceil_div

MAX_CHUNK_BYTES = 2 * GiB - 64 * KiB
"""Registered in one piece at most: AMD's Pollara NICs refuse 2 GiB."""
MAX_BATCH_BYTES = 64 * MiB
"""Of one transfer. Bounds what is under way when a read has to stop, and, as MORI merges neighbours within a batch,
the longest message: NICs take 1 GiB."""
MAX_BATCH_SEGMENTS = 512
"""Of one transfer. A queue pair holds 8192 operations."""


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """A region of `num_blocks` blocks, registered in chunks of `blocks_per_chunk` whole blocks (the last has less)."""

    num_blocks: int
    block_bytes: int
    stride_bytes: int
    """From one block to the next."""
    blocks_per_chunk: int

    @property
    def num_chunks(self) -> int:
        """How many pieces the region is registered in."""
        return ceil_div(self.num_blocks, self.blocks_per_chunk)

    @property
    def is_dense(self) -> bool:
        """Whether neighbouring blocks are neighbouring bytes."""
        return self.stride_bytes == self.block_bytes

    def chunk_start(self, chunk: int) -> int:
        """First byte of a chunk, counted from the region's."""
        return chunk * self.blocks_per_chunk * self.stride_bytes

    def chunk_bytes(self, chunk: int) -> int:
        """Bytes from the first to the last of a chunk."""
        blocks = min(self.blocks_per_chunk, self.num_blocks - chunk * self.blocks_per_chunk)
        return (blocks - 1) * self.stride_bytes + self.block_bytes

    def locate(self, block: int) -> tuple[int, int]:
        """The chunk that holds a block, and the block's offset in it."""
        chunk, index = divmod(block, self.blocks_per_chunk)
        return chunk, index * self.stride_bytes

    def num_left(self, block: int) -> int:
        """Blocks from this one to the end of its chunk."""
        return self.blocks_per_chunk - block % self.blocks_per_chunk


def lay_out(
    *, num_blocks: int, block_bytes: int, stride_bytes: int, max_chunk_bytes: int = MAX_CHUNK_BYTES
) -> ChunkLayout:
    """The chunks of a region, as large as they may be. Raises `TransferError` if a block is larger than a chunk."""
    if block_bytes > max_chunk_bytes:
        raise TransferError(f"a block of {block_bytes} bytes cannot be registered; the limit is {max_chunk_bytes}")
    blocks_per_chunk = min(num_blocks, (max_chunk_bytes - block_bytes) // stride_bytes + 1)
    return ChunkLayout(num_blocks, block_bytes, stride_bytes, blocks_per_chunk)


@dataclass(slots=True)
class Batch:
    """Segments between one local and one remote chunk: what one transfer moves."""

    local_chunk: int
    remote_chunk: int
    local_offsets: list[int] = field(default_factory=list)
    remote_offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    num_bytes: int = 0

    def has_room(self, num_bytes: int) -> bool:
        """Whether another segment of that size may be added."""
        return len(self.sizes) < MAX_BATCH_SEGMENTS and self.num_bytes + num_bytes <= MAX_BATCH_BYTES

    def add(self, local_offset: int, remote_offset: int, num_bytes: int) -> None:
        """Add a segment, to the last one if it continues it; offsets are bytes within the chunks."""
        self.num_bytes += num_bytes
        if self.sizes and (local_offset - self.local_offsets[-1], remote_offset - self.remote_offsets[-1]) == (
            self.sizes[-1],
            self.sizes[-1],
        ):
            self.sizes[-1] += num_bytes
            return
        self.local_offsets.append(local_offset)
        self.remote_offsets.append(remote_offset)
        self.sizes.append(num_bytes)


def plan_batches(
    local: ChunkLayout,
    remote: ChunkLayout,
    *,
    remote_blocks: Sequence[int],
    local_blocks: Sequence[int],
    pieces: Sequence[Piece] | None = None,
) -> list[Batch]:
    """Copies of remote block i to local block i, whole or only these pieces, as batches; neighbours are joined."""
    batches: list[Batch] = []
    filling: dict[tuple[int, int], Batch] = {}
    runs = _block_runs(local, remote, remote_blocks, local_blocks)
    for remote_block, local_block, count in runs if pieces is None else zip(remote_blocks, local_blocks, repeat(1)):
        local_chunk, local_offset = local.locate(local_block)
        remote_chunk, remote_offset = remote.locate(remote_block)
        spans = [(0, 0, count * local.block_bytes)] if pieces is None else _spans(pieces)
        for to, fro, num_bytes in spans:
            for done in range(0, num_bytes, MAX_BATCH_BYTES):
                part = min(MAX_BATCH_BYTES, num_bytes - done)
                batch = filling.get((local_chunk, remote_chunk))
                if batch is None or not batch.has_room(part):
                    batch = filling[local_chunk, remote_chunk] = Batch(local_chunk, remote_chunk)
                    batches.append(batch)
                batch.add(local_offset + to + done, remote_offset + fro + done, part)
    return batches


def _block_runs(
    local: ChunkLayout, remote: ChunkLayout, remote_blocks: Sequence[int], local_blocks: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """(remote block, local block, count) of runs that are contiguous bytes within one chunk on both sides."""
    is_dense = local.is_dense and remote.is_dense
    for start, length in adjacent_runs(remote_blocks, local_blocks, max_blocks=max(1, len(remote_blocks))):
        position, stop = start, start + length
        while position < stop:
            fro, to = remote_blocks[position], local_blocks[position]
            count = min(stop - position, remote.num_left(fro), local.num_left(to)) if is_dense else 1
            yield fro, to, count
            position += count


def _spans(pieces: Sequence[Piece]) -> Iterator[tuple[int, int, int]]:
    """(local offset, remote offset, bytes) of every run of the pieces of a block."""
    for piece in pieces:
        for run in range(piece.local.count):
            to = piece.local.offset + run * piece.local.stride
            yield to, piece.remote.offset + run * piece.remote.stride, piece.local.num_bytes
