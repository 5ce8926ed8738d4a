"""The copies that a read is made of, in batches that are soon over. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from atom_cluster.kv_transfer.pieces import Piece
from atom_cluster.kv_transfer.regions import IntArray
from atom_cluster.units import MiB

BATCH_BYTES = 128 * MiB
"""What is given to the copy engines at once; it can only be waited for. At 350 GiB/s, 0.4 ms."""
KERNEL_BATCH_BYTES = 256 * MiB
"""The same of the kernel, whose launch takes the host longer, whatever it copies."""
_MAX_COMMANDS = 512
"""Of the copy engines in one batch: they cost the calling thread half a microsecond or more each."""
MAX_COPIES = 16 * 1024
"""Of the kernel in one batch: their addresses take 256 KiB."""
_ALIGNMENTS = (16, 8, 1)
"""That make a difference to the kernel."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the blocks of a cache group are, as this process addresses them."""

    address: int
    stride_bytes: int

    def of(self, block_ids: IntArray) -> IntArray:
        """Addresses of these blocks."""
        return self.address + self.stride_bytes * block_ids


@dataclass(slots=True)
class Batch:
    """Copies between addresses; the arrays are as long. For the kernel they are of one size."""

    targets: IntArray
    sources: IntArray
    sizes: IntArray
    """Bytes."""
    num_bytes: int
    """Of all copies."""
    by_kernel: bool
    alignment: int
    """16, 8 or 1: what all addresses and sizes are multiples of."""


@dataclass(slots=True)
class Ramp:
    """How many copies a read's next batch for the engines has at most.

    They begin when they are given the last one of a batch: so the first batch is small, and the following ones grow, so
    that the calling thread is done with one before the engines are with those before it.
    """

    num_commands: int = 16

    def advance(self) -> None:
        """A batch was made."""
        self.num_commands = min(2 * self.num_commands, _MAX_COMMANDS)


def batches(
    remote_blocks: IntArray,
    local_blocks: IntArray,
    pieces: Sequence[Piece] | None,
    *,
    source: Rows,
    target: Rows,
    block_bytes: int,
    kernel_below_bytes: int,
    ramp: Ramp,
) -> Iterator[Batch]:
    """The copies of remote block i, or of these pieces of it, to local block i.

    What lies together on both sides, on average, in less than `kernel_below_bytes` is for the kernel, the rest for copy
    engines. block_bytes: of a whole block, which has one size on both sides if `pieces` is None. ramp: of the read.
    """
    sources, targets = source.of(remote_blocks), target.of(local_blocks)
    ends = (source.address, source.stride_bytes, target.address, target.stride_bytes)
    if pieces is None:
        alignment = _alignment(*ends, block_bytes)
        yield from _of_blocks(sources, targets, block_bytes, kernel_below_bytes, alignment, ramp)
        return
    for piece in pieces:
        extents = (n for e in (piece.remote, piece.local) for n in (e.offset, e.stride, e.num_bytes))
        yield from _of_piece(sources, targets, piece, kernel_below_bytes, _alignment(*ends, *extents), ramp)


def _of_blocks(
    sources: IntArray, targets: IntArray, block_bytes: int, kernel_below_bytes: int, alignment: int, ramp: Ramp
) -> Iterator[Batch]:
    num_blocks = len(sources)
    if not num_blocks:
        return
    starts = _starts_of_runs(sources, targets, block_bytes)
    by_kernel = num_blocks * block_bytes < kernel_below_bytes * len(starts)
    most = max(1, BATCH_BYTES // block_bytes)
    if not by_kernel and len(starts) == 1 and num_blocks <= most:
        num_bytes = num_blocks * block_bytes
        yield Batch(targets[:1], sources[:1], np.array([num_bytes]), num_bytes, by_kernel=False, alignment=alignment)
        return
    if by_kernel or len(starts) == num_blocks:
        yield from _cut_alike(targets, sources, block_bytes, by_kernel=by_kernel, alignment=alignment, ramp=ramp)
        return
    lengths = _lengths(starts, num_blocks)
    if num_blocks > most and lengths.max() > most:
        starts = np.concatenate([np.arange(start, start + n, most) for start, n in zip(starts, lengths)])
        lengths = _lengths(starts, num_blocks)
    yield from _cut(targets[starts], sources[starts], lengths * block_bytes, alignment=alignment, ramp=ramp)


def _starts_of_runs(sources: IntArray, targets: IntArray, block_bytes: int) -> IntArray:
    """Indices of blocks that do not lie right behind the block before, on both sides."""
    is_start = np.ones(len(sources), dtype=np.bool_)
    np.not_equal(sources[1:] - sources[:-1], block_bytes, out=is_start[1:])
    is_start[1:] |= targets[1:] - targets[:-1] != block_bytes
    return is_start.nonzero()[0]


def _lengths(starts: IntArray, num_blocks: int) -> IntArray:
    """Of runs that begin there."""
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1] = num_blocks - starts[-1]
    return lengths


def _of_piece(
    sources: IntArray, targets: IntArray, piece: Piece, kernel_below_bytes: int, alignment: int, ramp: Ramp
) -> Iterator[Batch]:
    remote, local = piece.remote, piece.local
    by_kernel = remote.num_bytes < kernel_below_bytes
    runs = np.arange(remote.count)
    # As many blocks at once as make one batch, so that no large arrays are made of the many runs of many blocks.
    most = max(1, (MAX_COPIES if by_kernel else _MAX_COMMANDS) // remote.count)
    for first in range(0, len(sources), most):
        some = slice(first, first + most)
        froms = (sources[some, None] + (remote.offset + remote.stride * runs)).ravel()
        tos = (targets[some, None] + (local.offset + local.stride * runs)).ravel()
        yield from _cut_alike(tos, froms, remote.num_bytes, by_kernel=by_kernel, alignment=alignment, ramp=ramp)


def _cut_alike(
    targets: IntArray, sources: IntArray, num_bytes: int, *, by_kernel: bool, alignment: int, ramp: Ramp
) -> Iterator[Batch]:
    """Batches of copies of so many bytes each, within the limits, but of at least one."""
    sizes = np.full(len(targets), num_bytes, dtype=np.int64)
    if not by_kernel:
        yield from _cut(targets, sources, sizes, alignment=alignment, ramp=ramp)
        return
    most = min(MAX_COPIES, max(1, KERNEL_BATCH_BYTES // num_bytes))
    for first in range(0, len(targets), most):
        some = slice(first, first + most)
        count = len(sizes[some])
        yield Batch(targets[some], sources[some], sizes[some], count * num_bytes, by_kernel=True, alignment=alignment)


def _cut(targets: IntArray, sources: IntArray, sizes: IntArray, *, alignment: int, ramp: Ramp) -> Iterator[Batch]:
    """The same for copy engines, of copies of any sizes."""
    ends = sizes.cumsum()
    first, done = 0, 0
    while first < len(sizes):
        fitting = int(ends.searchsorted(done + BATCH_BYTES, side="right"))
        stop = min(max(fitting, first + 1), first + ramp.num_commands)
        ramp.advance()
        some, end = slice(first, stop), int(ends[stop - 1])
        yield Batch(targets[some], sources[some], sizes[some], end - done, by_kernel=False, alignment=alignment)
        first, done = stop, end


def _alignment(*numbers: int) -> int:
    together = math.gcd(*numbers)
    return next(alignment for alignment in _ALIGNMENTS if together % alignment == 0)
