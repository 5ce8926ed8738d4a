"""KV regions as plain bytes: shapes that two ranks must agree on, runs of adjacent blocks, views to copy through.

Knows nothing of sockets, processes or checksums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Struct

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.protocol import KvRegion

ByteArray = npt.NDArray[np.uint8]


class RegionShape(Struct, frozen=True, array_like=True):
    """What a reader must know about one region of a peer."""

    name: str
    num_blocks: int
    block_bytes: int


def shape_of(region: KvRegion) -> RegionShape:
    """The shape of a region; regions are read across only between equal names and `block_bytes`."""
    return RegionShape(region.name, region.blocks.shape[0], region.block_bytes)


def byte_rows(region: KvRegion) -> torch.Tensor:
    """The region's memory as uint8 [num_blocks, block_bytes]; rows may be further apart than `block_bytes`.

    Raises `TransferError` when single blocks are not contiguous.
    """
    blocks = region.blocks
    if blocks.ndim < 2 or blocks.shape[0] == 0 or not blocks[0].is_contiguous():
        raise TransferError(f"region {region.name}: needs at least one block, each of them contiguous")
    if blocks.stride(0) < blocks[0].numel():
        raise TransferError(f"region {region.name}: blocks overlap")
    flat = blocks.as_strided((blocks.shape[0], blocks[0].numel()), (blocks.stride(0), 1))
    return flat.view(torch.uint8)


def check_fits(own: Sequence[RegionShape], other: Sequence[RegionShape]) -> None:
    """Raise `TransferError` unless the groups are the same and their blocks fit; numbers of blocks may differ."""
    ours = [(shape.name, shape.block_bytes) for shape in own]
    theirs = [(shape.name, shape.block_bytes) for shape in other]
    if ours != theirs:
        raise TransferError(f"the peer's KV regions (name, bytes per block) {theirs} are not ours, {ours}")


def check_blocks(shapes: Sequence[RegionShape], group: int, block_ids: Sequence[int], *, whose: str) -> None:
    """Raise `TransferError` if there is no such group, or a block id is out of its range."""
    if not 0 <= group < len(shapes):
        raise TransferError(f"{whose} cache groups are {len(shapes)}; there is no group {group}")
    num_blocks = shapes[group].num_blocks
    if block_ids and not 0 <= min(block_ids) <= max(block_ids) < num_blocks:
        raise TransferError(f"{whose} block ids reach outside [0, {num_blocks})")


def adjacent_runs(*block_lists: Sequence[int], max_blocks: int) -> Iterator[tuple[int, int]]:
    """Split positions of equally long lists into (start, length) where every list counts up by one within a run."""
    num_blocks = len(block_lists[0])
    start = 0
    while start < num_blocks:
        stop = start + 1
        while (
            stop < num_blocks
            and stop - start < max_blocks
            and all(blocks[stop] == blocks[stop - 1] + 1 for blocks in block_lists)
        ):
            stop += 1
        yield start, stop - start
        start = stop


def host_views(rows: ByteArray, block_ids: Sequence[int], *, max_bytes: int) -> Iterator[memoryview]:
    """The memory of these blocks, in order, as flat views of at most `max_bytes`; adjacent blocks share a view."""
    block_bytes = rows.shape[1]
    is_dense = rows.strides[0] == block_bytes
    max_blocks = max(1, max_bytes // block_bytes) if is_dense else 1
    for start, length in adjacent_runs(block_ids, max_blocks=max_blocks):
        first = block_ids[start]
        view = rows[first : first + length].reshape(-1).data
        for offset in range(0, len(view), max_bytes):
            yield view[offset : offset + max_bytes]
