from __future__ import annotations

import random

import pytest

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.mori_plan import (
    MAX_BATCH_BYTES,
    MAX_BATCH_SEGMENTS,
    MAX_CHUNK_BYTES,
    ChunkLayout,
    lay_out,
    plan_batches,
)
from atom_cluster.kv_transfer.pieces import Extent, Piece

DENSE = ChunkLayout(num_blocks=40, block_bytes=10, stride_bytes=10, blocks_per_chunk=16)


def moved(
    local: ChunkLayout,
    remote: ChunkLayout,
    remote_blocks: list[int],
    local_blocks: list[int],
    pieces: list[Piece] | None = None,
) -> dict[int, int]:
    """Where each local byte comes from, counted from the regions' starts; every segment lies within its chunks."""
    sources: dict[int, int] = {}
    for batch in plan_batches(local, remote, remote_blocks=remote_blocks, local_blocks=local_blocks, pieces=pieces):
        assert batch.num_bytes == sum(batch.sizes) <= MAX_BATCH_BYTES
        assert len(batch.sizes) <= MAX_BATCH_SEGMENTS
        for to, fro, size in zip(batch.local_offsets, batch.remote_offsets, batch.sizes, strict=True):
            assert to + size <= local.chunk_bytes(batch.local_chunk)
            assert fro + size <= remote.chunk_bytes(batch.remote_chunk)
            for index in range(size):
                target = local.chunk_start(batch.local_chunk) + to + index
                assert target not in sources
                sources[target] = remote.chunk_start(batch.remote_chunk) + fro + index
    return sources


@pytest.mark.parametrize("remote_stride", [10, 25])
@pytest.mark.parametrize("local_stride", [10, 13])
@pytest.mark.parametrize("seed", range(5))
def test_every_byte_comes_from_its_block_whatever_the_chunks_and_strides(
    seed: int, local_stride: int, remote_stride: int
) -> None:
    generator = random.Random(seed)
    local = ChunkLayout(60, 10, local_stride, generator.randint(1, 60))
    remote = ChunkLayout(50, 10, remote_stride, generator.randint(1, 50))
    local_blocks, remote_blocks = list(range(5, 55)), list(range(50))
    if seed % 2:
        generator.shuffle(local_blocks)
    expected = {
        to * local_stride + byte: fro * remote_stride + byte
        for fro, to in zip(remote_blocks, local_blocks, strict=True)
        for byte in range(10)
    }
    assert moved(local, remote, remote_blocks, local_blocks) == expected


def test_neighbours_are_one_segment_up_to_a_chunks_end() -> None:
    (first, second) = plan_batches(DENSE, DENSE, remote_blocks=range(10, 20), local_blocks=range(20, 30))
    assert (first.local_chunk, first.remote_chunk, first.local_offsets, first.sizes) == (1, 0, [40], [60])
    assert (second.local_chunk, second.remote_chunk, second.remote_offsets, second.sizes) == (1, 1, [0], [40])


def test_a_batch_is_bounded_in_bytes_and_segments() -> None:
    large = ChunkLayout(
        num_blocks=4, block_bytes=MAX_BATCH_BYTES // 2, stride_bytes=MAX_BATCH_BYTES, blocks_per_chunk=4
    )
    assert [batch.num_bytes for batch in plan_batches(large, large, remote_blocks=range(4), local_blocks=range(4))] == [
        MAX_BATCH_BYTES,
        MAX_BATCH_BYTES,
    ]
    huge = ChunkLayout(1, MAX_BATCH_BYTES * 5 // 2, MAX_BATCH_BYTES * 5 // 2, 1)
    batches = plan_batches(huge, huge, remote_blocks=[0], local_blocks=[0])
    assert [(batch.local_offsets, batch.num_bytes) for batch in batches] == [
        ([0], MAX_BATCH_BYTES),
        ([MAX_BATCH_BYTES], MAX_BATCH_BYTES),
        ([2 * MAX_BATCH_BYTES], MAX_BATCH_BYTES // 2),
    ]
    many = ChunkLayout(2000, 1, 1, 2000)
    blocks = range(1000, -1, -1)
    sizes = [len(batch.sizes) for batch in plan_batches(many, many, remote_blocks=blocks, local_blocks=blocks)]
    assert sizes == [MAX_BATCH_SEGMENTS, 1001 - MAX_BATCH_SEGMENTS]


@pytest.mark.parametrize("seed", range(5))
def test_of_pieces_exactly_their_bytes_are_moved(seed: int) -> None:
    generator = random.Random(seed)
    local = ChunkLayout(20, 24, 24, generator.randint(1, 20))
    remote = ChunkLayout(20, 48, 50, generator.randint(1, 20))
    pieces = [Piece(Extent(24, 4, 3, 8), Extent(12, 4, 3, 4)), Piece(Extent(0, 5), Extent(2, 5))]
    local_blocks, remote_blocks = generator.sample(range(20), 12), generator.sample(range(20), 12)
    within = {12 + run * 4 + byte: 24 + run * 8 + byte for run in range(3) for byte in range(4)}
    within |= {2 + byte: byte for byte in range(5)}
    expected = {
        to * 24 + mine: fro * 50 + theirs
        for fro, to in zip(remote_blocks, local_blocks, strict=True)
        for mine, theirs in within.items()
    }
    assert moved(local, remote, remote_blocks, local_blocks, pieces) == expected


def test_runs_of_pieces_that_lie_together_on_both_sides_are_one_segment() -> None:
    pieces = [Piece(Extent(0, 2, 3, 2), Extent(4, 2, 3, 2)), Piece(Extent(6, 1), Extent(3, 1))]
    (batch,) = plan_batches(DENSE, DENSE, remote_blocks=[0], local_blocks=[0], pieces=pieces)
    assert (batch.local_offsets, batch.remote_offsets, batch.sizes) == ([4, 3], [0, 6], [6, 1])


def test_chunks_are_whole_blocks_and_as_large_as_may_be_registered() -> None:
    layout = lay_out(num_blocks=100_000, block_bytes=1 << 20, stride_bytes=1 << 20)
    assert layout.blocks_per_chunk == 2047
    assert layout.num_chunks == 49
    assert layout.chunk_bytes(0) <= MAX_CHUNK_BYTES
    assert sum(layout.chunk_bytes(chunk) for chunk in range(49)) == 100_000 << 20
    assert lay_out(num_blocks=7, block_bytes=3, stride_bytes=5).chunk_bytes(0) == 33
    with pytest.raises(TransferError, match="cannot be registered"):
        lay_out(num_blocks=1, block_bytes=MAX_CHUNK_BYTES + 1, stride_bytes=MAX_CHUNK_BYTES + 1)
