"""KV regions as plain bytes: shapes that two ranks must agree on, runs of adjacent blocks, views to copy through.

Knows nothing of sockets, processes or checksums.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from msgspec import Struct

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.pieces import Extent, PeerShape, Piece
from atom_cluster.kv_transfer.protocol import KvRegion

ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


class RegionShape(Struct, frozen=True, array_like=True):
    """What a reader must know about one region of a peer."""

    name: str
    num_blocks: int
    block_bytes: int


def shape_of(region: KvRegion) -> RegionShape:
    """The shape of a region; regions are read across only between equal names."""
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


def check_peer(
    own: Sequence[RegionShape], own_rank: int, other: Sequence[RegionShape], rank: int, shape: PeerShape | None
) -> None:
    """Raise `TransferError` unless a descriptor, of `rank`, is of the expected rank with the same groups as ours.

    Blocks must be as large as `shape` says, or as ours; numbers of blocks may differ.
    """
    expected_rank = own_rank if shape is None else shape.rank
    if rank != expected_rank:
        raise TransferError(f"the descriptor is of rank {rank}, expected was rank {expected_rank}")
    sizes = tuple(region.block_bytes for region in own) if shape is None else shape.block_bytes
    expected = [(region.name, num_bytes) for region, num_bytes in zip(own, sizes)]
    found = [(region.name, region.block_bytes) for region in other]
    if found != expected:
        raise TransferError(f"the peer's KV regions (name, bytes per block) are {found}, expected were {expected}")


def check_read(
    own: Sequence[RegionShape],
    other: Sequence[RegionShape],
    group: int,
    remote_blocks: Sequence[int] | IntArray,
    local_blocks: Sequence[int] | IntArray,
    pieces: Sequence[Piece] | None,
) -> None:
    """Raise `TransferError` unless these blocks, and pieces of them, are there on both sides."""
    check_blocks(other, group, remote_blocks, whose="the peer's")
    check_blocks(own, group, local_blocks, whose="local")
    if pieces is not None:
        check_extents([piece.remote for piece in pieces], other[group].block_bytes)
        check_extents([piece.local for piece in pieces], own[group].block_bytes)
    elif own[group].block_bytes != other[group].block_bytes:
        raise TransferError("whole blocks of another size cannot be read")


def check_extents(extents: Sequence[Extent], block_bytes: int) -> None:
    """Raise `TransferError` unless these are within a block, and no more than all of it."""
    for extent in extents:
        if min(extent.offset, extent.num_bytes - 1, extent.count - 1) < 0 or extent.stop > block_bytes:
            raise TransferError(f"{extent} is not within a block of {block_bytes} bytes")
        if extent.count > 1 and extent.stride < extent.num_bytes:
            raise TransferError(f"the runs of {extent} overlap")
    if packed_bytes(extents) > block_bytes:
        raise TransferError(f"{packed_bytes(extents)} bytes of a block of {block_bytes}")


def packed_bytes(extents: Iterable[Extent]) -> int:
    """Bytes of a block that these are."""
    return sum(extent.total_bytes for extent in extents)


def extent_view(rows: ByteArray, extent: Extent) -> ByteArray:
    """The extent in each of these blocks, uint8 [blocks, runs, bytes of a run]; writable if `rows` is."""
    shape = (rows.shape[0], extent.count, extent.num_bytes)
    strides = (rows.strides[0], extent.stride, 1)
    return np.lib.stride_tricks.as_strided(rows[:, extent.offset :], shape, strides, writeable=rows.flags.writeable)


def id_array(block_ids: Sequence[int]) -> IntArray:
    """These ids as numbers of 64 bits. Raises `TransferError` for one that is none."""
    try:
        return np.frombuffer(_packer(len(block_ids)).pack(*block_ids), dtype=np.int64)  # the fastest way there is
    except struct.error as exc:
        raise TransferError(f"not the ids of blocks: {exc}") from exc


@lru_cache(maxsize=64)
def _packer(count: int) -> struct.Struct:
    """Made anew, it takes as long as the packing."""
    return struct.Struct(f"{count}q")


def check_blocks(shapes: Sequence[RegionShape], group: int, block_ids: Sequence[int] | IntArray, *, whose: str) -> None:
    """Raise `TransferError` if there is no such group, or a block id is out of its range."""
    if not 0 <= group < len(shapes):
        raise TransferError(f"{whose} cache groups are {len(shapes)}; there is no group {group}")
    num_blocks = shapes[group].num_blocks
    ids = block_ids if isinstance(block_ids, np.ndarray) else id_array(block_ids)
    # As numbers without a sign, negative ones are the largest.
    if ids.size and ids.view(np.uint64).max() >= num_blocks:
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


def packed_pairs(
    rows: ByteArray, block_ids: Sequence[int], extents: Sequence[Extent], packed: ByteArray
) -> Iterator[tuple[ByteArray, ByteArray]]:
    """Views of equal shape, of extents of these blocks and of where they are in `packed`, [blocks, bytes of extents].

    In `packed` each block's extents are one after the other. Copy one of each pair into the other.
    """
    for start, length in adjacent_runs(block_ids, max_blocks=len(block_ids)):
        blocks, target = rows[block_ids[start] : block_ids[start] + length], packed[start : start + length]
        offset = 0
        for extent in extents:
            dense = Extent(offset, extent.num_bytes, extent.count, extent.num_bytes)
            yield extent_view(blocks, extent), extent_view(target, dense)
            offset += extent.total_bytes
