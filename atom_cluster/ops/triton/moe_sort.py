"""Pairs of a token and an expert, sorted by expert and cut into tiles of one expert each. Knows no weights.

Shape suffixes: T tokens, K experts per token, N pairs (T * K), E experts, M tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import room_for, varying

_CHUNK = 1024
"""Pairs that are counted together; up to so many are sorted by one launch."""
_LARGE_CHUNK = 4096
"""Of very many pairs, so that all programs have fewer counts to sum up."""
_MOST_CHUNKS = 32
_PAIRS_PER_PROGRAM = 8192
FEWEST_ROWS = 16
"""Of a tile: matrix units take no fewer."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Pairs in some order, and runs of them that have the same expert. Pairs of experts that are not here are in none.

    Sorted: those of the first expert come first. Unsorted: in the order of tokens, and each is a tile of its own.
    """

    pair_N: torch.Tensor | None
    """int32, sorted: numbers of pairs (token * K + choice) by row."""
    tile_ptr: torch.Tensor
    """Sorted: int32 [M, 4], expert, first row, the row behind the expert's last one, the expert's first tile; expert
    -1: no tile, nor any behind it. Unsorted: int64, the experts of all pairs."""
    count: int
    """M: tiles that there may be."""
    rows: int
    """A tile has at most so many, and room for so many is computed."""
    found_1: torch.Tensor | None = None
    """int32, sorted: tiles that there are."""


def unsorted_pairs(expert_TK: torch.Tensor) -> Tiles:
    """Without any launch: for so few pairs that most experts have one at most."""
    return Tiles(None, expert_TK, expert_TK.numel(), FEWEST_ROWS)


def sort_pairs(expert_TK: torch.Tensor, num_experts: int, rows: int, tiles_multiple: int) -> Tiles:
    """expert_TK: int64, in [0, num_experts], where num_experts stands for one that is not here.

    Room for tiles depends on shapes alone, and is a multiple of `tiles_multiple`.
    """
    num_pairs = expert_TK.numel()
    most_tiles = min(num_pairs, num_pairs // rows + num_experts)
    most_tiles = triton.cdiv(most_tiles, tiles_multiple) * tiles_multiple
    pair_N = torch.empty(num_pairs, dtype=torch.int32, device=expert_TK.device)
    tile_M4 = torch.empty(most_tiles, 4, dtype=torch.int32, device=expert_TK.device)
    found_1 = torch.empty(1, dtype=torch.int32, device=expert_TK.device)
    num_bins = max(16, triton.next_power_of_2(num_experts + 1))
    chunk = _CHUNK if num_pairs <= _MOST_CHUNKS * _CHUNK else _LARGE_CHUNK
    num_chunks = triton.cdiv(num_pairs, chunk)
    chunks_per_program = _PAIRS_PER_PROGRAM // chunk
    count_CE = expert_TK
    if num_chunks > 1:
        count_CE = torch.empty(num_chunks, num_bins, dtype=torch.int32, device=expert_TK.device)
        _count_kernel[(num_chunks,)](
            expert_TK, count_CE, num_pairs, num_experts, chunk, num_bins, num_warps=4, **launch_options()
        )
    else:
        chunk, chunks_per_program = min(_CHUNK, max(16, room_for(num_pairs))), 1
    _sort_kernel[(num_experts + 1, triton.cdiv(num_chunks, chunks_per_program))](
        expert_TK,
        count_CE,
        pair_N,
        tile_M4,
        found_1,
        num_pairs,
        num_experts,
        num_chunks,
        most_tiles,
        rows,
        chunk,
        chunks_per_program,
        num_bins,
        IS_ONE_CHUNK=num_chunks == 1,
        num_warps=4,
        **launch_options(),
    )
    return Tiles(pair_N, tile_M4, most_tiles, rows, found_1)


@triton.jit
def _load_experts(expert_ptr, first, num_pairs, num_experts, CHUNK: tl.constexpr):
    pair = first + tl.arange(0, CHUNK)
    return tl.load(expert_ptr + pair, pair < num_pairs, other=num_experts).to(tl.int32)


@triton.jit(**varying("num_pairs"))
def _count_kernel(
    expert_ptr,
    count_ptr,
    num_pairs,
    num_experts,
    CHUNK: tl.constexpr,
    NUM_BINS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Pairs of each expert in one chunk."""
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    chunk = tl.program_id(0)
    expert = _load_experts(expert_ptr, chunk * CHUNK, num_pairs, num_experts, CHUNK)
    count = tl.histogram(expert, NUM_BINS)
    tl.store(count_ptr + chunk * NUM_BINS + tl.arange(0, NUM_BINS), count)


@triton.jit(**varying("num_pairs", "num_chunks", "most_tiles"))
def _sort_kernel(
    expert_ptr,
    count_ptr,
    pair_ptr,
    tile_ptr,
    found_ptr,
    num_pairs,
    num_experts,
    num_chunks,
    most_tiles,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    IS_ONE_CHUNK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Places one expert's pairs of some chunks; the first program of an expert writes its tiles."""
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    mine, first_chunk = tl.program_id(0), tl.program_id(1) * CHUNKS
    bins = tl.arange(0, NUM_BINS)
    total = tl.zeros([NUM_BINS], tl.int32)
    before = tl.zeros([NUM_BINS], tl.int32)
    if IS_ONE_CHUNK:
        total += tl.histogram(_load_experts(expert_ptr, 0, num_pairs, num_experts, CHUNK), NUM_BINS)
    else:
        for first in range(0, num_chunks, 8):
            chunk = first + tl.arange(0, 8)[:, None]
            count = tl.load(count_ptr + chunk * NUM_BINS + bins[None, :], chunk < num_chunks, other=0)
            total += tl.sum(count, 0)
            before += tl.sum(tl.where(chunk < first_chunk, count, 0), 0)
    num_tiles = (total + ROWS - 1) // ROWS
    first_tile = tl.sum(tl.where(bins < mine, num_tiles, 0))
    if mine == num_experts:
        if first_chunk == 0:
            tl.store(found_ptr, first_tile)
            for start in range(first_tile, most_tiles, NUM_BINS):
                tile = start + bins
                tl.store(tile_ptr + tile * 4, -1, tile < most_tiles)
    else:
        first_row = tl.sum(tl.where(bins < mine, total, 0))
        my_total = tl.sum(tl.where(bins == mine, total, 0))
        if first_chunk == 0:
            my_tiles = (my_total + ROWS - 1) // ROWS
            for start in range(0, my_tiles, NUM_BINS):
                tile = start + bins
                place = tile_ptr + (first_tile + tile) * 4
                tl.store(place, mine, tile < my_tiles)
                tl.store(place + 1, first_row + tile * ROWS, tile < my_tiles)
                tl.store(place + 2, first_row + my_total, tile < my_tiles)
                tl.store(place + 3, first_tile, tile < my_tiles)
        next_row = first_row + tl.sum(tl.where(bins == mine, before, 0))
        for index in range(CHUNKS):
            first = (first_chunk + index) * CHUNK
            expert = _load_experts(expert_ptr, first, num_pairs, num_experts, CHUNK)
            is_mine = (expert == mine).to(tl.int32)
            row = next_row + tl.cumsum(is_mine, 0) - 1
            tl.store(pair_ptr + row, first + tl.arange(0, CHUNK), is_mine != 0)
            next_row += tl.sum(is_mine)
