"""The copies that a read is made of, in batches that are soon over. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atom_cluster.kv_transfer.pieces import Piece
from atom_cluster.units import MiB

IntArray = npt.NDArray[np.int64]

BATCH_BYTES = 64 * MiB
"""What is given to the device at once; it can only be waited for."""
_MAX_COMMANDS = 256
"""Of the copy engines in one batch: they cost the calling thread a microsecond or two each."""
_MAX_COPIES = 16 * 1024
"""Of the kernel in one batch: their addresses take 256 KiB."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the blocks of a cache group are, as this process addresses them."""

    address: int
    stride_bytes: int

    def of(self, block_ids: IntArray) -> IntArray:
        """Addresses of these blocks."""
        return self.address + self.stride_bytes * block_ids


@dataclass(frozen=True, slots=True)
class Batch:
    """Copies between addresses; the arrays are as long. For the kernel they are of one size."""

    targets: IntArray
    sources: IntArray
    sizes: IntArray
    """Bytes."""
    by_kernel: bool

    @property
    def num_bytes(self) -> int:
        """Of all copies."""
        return int(self.sizes.sum())


def batches(
    remote_blocks: Sequence[int],
    local_blocks: Sequence[int],
    pieces: Sequence[Piece] | None,
    *,
    source: Rows,
    target: Rows,
    block_bytes: int,
    kernel_below_bytes: int,
) -> Iterator[Batch]:
    """The copies of remote block i, or of these pieces of it, to local block i.

    What lies together on both sides, on average, in less than `kernel_below_bytes` is for the kernel, the rest for copy
    engines. block_bytes: of a whole block, which has one size on both sides if `pieces` is None.
    """
    sources = source.of(np.array(remote_blocks, dtype=np.int64))
    targets = target.of(np.array(local_blocks, dtype=np.int64))
    if pieces is None:
        yield from _of_blocks(sources, targets, block_bytes, kernel_below_bytes)
        return
    for piece in pieces:
        yield from _of_piece(sources, targets, piece, kernel_below_bytes)


def _of_blocks(sources: IntArray, targets: IntArray, block_bytes: int, kernel_below_bytes: int) -> Iterator[Batch]:
    num_blocks = len(sources)
    is_start = np.ones(num_blocks, dtype=bool)
    is_start[1:] = (np.diff(sources) != block_bytes) | (np.diff(targets) != block_bytes)
    if num_blocks * block_bytes < kernel_below_bytes * int(is_start.sum()):
        sizes = np.full(num_blocks, block_bytes, dtype=np.int64)
        yield from _cut(targets, sources, sizes, by_kernel=True)
        return
    index = np.arange(num_blocks)
    place_in_run = index - np.maximum.accumulate(np.where(is_start, index, 0))
    is_start |= place_in_run % max(1, BATCH_BYTES // block_bytes) == 0
    starts = index[is_start]
    sizes = np.diff(np.append(starts, num_blocks)) * block_bytes
    yield from _cut(targets[starts], sources[starts], sizes, by_kernel=False)


def _of_piece(sources: IntArray, targets: IntArray, piece: Piece, kernel_below_bytes: int) -> Iterator[Batch]:
    remote, local = piece.remote, piece.local
    by_kernel = remote.num_bytes < kernel_below_bytes
    runs = np.arange(remote.count)
    # As many blocks at once as make one batch, so that no large arrays are made of the many runs of many blocks.
    most = max(1, (_MAX_COPIES if by_kernel else _MAX_COMMANDS) // remote.count)
    for first in range(0, len(sources), most):
        some = slice(first, first + most)
        froms = (sources[some, None] + (remote.offset + remote.stride * runs)).ravel()
        tos = (targets[some, None] + (local.offset + local.stride * runs)).ravel()
        yield from _cut(tos, froms, np.full(len(tos), remote.num_bytes, dtype=np.int64), by_kernel=by_kernel)


def _cut(targets: IntArray, sources: IntArray, sizes: IntArray, *, by_kernel: bool) -> Iterator[Batch]:
    """Batches within the limits, of at least one copy each."""
    ends = np.cumsum(sizes)
    most = _MAX_COPIES if by_kernel else _MAX_COMMANDS
    first, done = 0, 0
    while first < len(sizes):
        fitting = int(np.searchsorted(ends, done + BATCH_BYTES, side="right"))
        stop = min(max(fitting, first + 1), first + most)
        yield Batch(targets[first:stop], sources[first:stop], sizes[first:stop], by_kernel)
        first, done = stop, int(ends[stop - 1])
