"""Grouped products of float8 codes with scales per block on sm_90: what `moe_gemm` computes, by warps with tasks.

Four warps gather rows of tokens and have blocks of weights copied, as room becomes free in shared memory. Two times
four warps have 64 rows of a tile each, and two blocks of 128 outputs: a gate's and what it gates, or neighbours. The
matrix units sum up 128 inputs; what those sums are multiplied by and added to is computed while the other four warps'
products fill the matrix units. Programs stay, and take tile after tile, so that copies for the next one are on their
way while results are written. Few rows cost no more than reading weights does: matrix units are fast enough to waste
rows.

Written in Gluon, which Triton calls experimental; `moe_gemm` does without. Knows no routing.
Shape suffixes: E experts, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from atom_cluster.ops.moe import ExpertActivation
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.bulk_copies import box_layout
from atom_cluster.ops.triton.mla_expanded_hopper import GL_TYPES
from atom_cluster.ops.triton.mla_hopper import HAS_TASKS
from atom_cluster.ops.triton.moe_sort import Tiles
from atom_cluster.ops.triton.moe_store_hopper import store_activated, store_rows
from atom_cluster.ops.triton.moe_weights import ExpertMatrix

ROWS = 128
"""Of a tile."""
BLOCK = 128
"""Inputs, and outputs, that share a scale, and that are taken at a time."""
_TILES_TOGETHER = 16
"""Of an expert, that are computed side by side, so that they share weights in the cache."""
_STAGES = 4
_PIECES_TO_STAGGER = 16
"""Tiles' blocks of outputs of a program, from which on it is worth while to begin a little later with half of each."""
_FEWEST_PAIRS_OF_MANY = 32768
"""From which on the second product is bound by the matrix units, however pairs are spread."""


@dataclass(frozen=True, slots=True)
class Codes:
    """Rows of float8 codes, and a scale for each 128 of a row."""

    values: torch.Tensor
    scale: torch.Tensor
    """[rows, groups] float32"""


def is_fit(matrix: ExpertMatrix, *, is_gated: bool) -> bool:
    """Whether the kernel takes these weights."""
    return (
        runtime.is_hopper()
        and HAS_TASKS
        and matrix.kind == "float8"
        and matrix.codes.dtype == torch.float8_e4m3fn
        and matrix.scale is not None
        and matrix.scale.dtype == torch.float32
        and matrix.bias is None
        and (matrix.rows, matrix.group) == (BLOCK, BLOCK)
        and matrix.num_in % BLOCK == 0
        and matrix.num_out % (2 * BLOCK if is_gated else BLOCK) == 0
        and matrix.codes.data_ptr() % 16 == 0
    )


def has_type(dtype: torch.dtype) -> bool:
    """Whether results may be of this type."""
    return dtype in GL_TYPES


def multiply_gated(
    inputs: Codes, matrix: ExpertMatrix, tiles: Tiles, activation: ExpertActivation, num_chosen: int, dtype: torch.dtype
) -> Codes:
    """Activated rows, in the order of tiles, of pairs of tokens and experts: rounded to `dtype`, then to codes."""
    assert tiles.pair_N is not None
    num_pairs, size = len(tiles.pair_N), matrix.num_out // 2
    codes = inputs.values.new_empty(num_pairs, size)
    scale = inputs.scale.new_empty(num_pairs, size // BLOCK)
    _launch(inputs, matrix, tiles, codes, scale, activation, num_chosen, dtype)
    return Codes(codes, scale)


def multiply_down(inputs: Codes, matrix: ExpertMatrix, tiles: Tiles, out: torch.Tensor) -> None:
    """Inputs are rows in the order of tiles, and out [N, outputs] gets rows where their pairs are."""
    _launch(inputs, matrix, tiles, out, inputs.scale, None, 1, out.dtype)


def _launch(
    inputs: Codes,
    matrix: ExpertMatrix,
    tiles: Tiles,
    out: torch.Tensor,
    out_scale: torch.Tensor,
    activation: ExpertActivation | None,
    num_chosen: int,
    dtype: torch.dtype,
) -> None:
    assert tiles.rows == ROWS and tiles.found_1 is not None and matrix.scale is not None
    num_pairs, size = out.shape
    num_blocks = triton.cdiv(size, BLOCK if activation is not None else 2 * BLOCK)
    multiply_kernel[(min(tiles.count * num_blocks, runtime.num_multiprocessors(out.device)),)](
        inputs.values,
        inputs.scale,
        _blocks_of(matrix),
        matrix.scale,
        tiles.pair_N,
        tiles.tile_ptr,
        tiles.found_1,
        out,
        out_scale,
        num_blocks,
        matrix.num_out,
        size,
        matrix.num_in // BLOCK,
        inputs.values.stride(0) // 16,
        inputs.scale.stride(0),
        matrix.scale.stride(0),
        matrix.scale.stride(1),
        0.0 if activation is None else activation.alpha,
        0.0 if activation is None or activation.limit is None else activation.limit,
        IS_GATED=activation is not None,
        IS_OAI=activation is not None and activation.kind == "swiglu_oai",
        HAS_LIMIT=activation is not None and activation.limit is not None,
        CHOSEN=num_chosen,
        DTYPE=GL_TYPES[dtype],
        TOGETHER=_TILES_TOGETHER,
        PIECES_TO_STAGGER=_PIECES_TO_STAGGER,
        STEP=1 if activation is None and num_pairs >= _FEWEST_PAIRS_OF_MANY else 2,
        ROWS=ROWS,
        BLOCK=BLOCK,
        STAGES=_STAGES,
        num_warps=4,
        launch_pdl=True,
    )


def _blocks_of(matrix: ExpertMatrix) -> TensorDescriptor:
    """All experts' rows below each other."""
    lines = matrix.codes.view(-1, matrix.num_in)
    layout = box_layout(BLOCK, BLOCK, torch.float8_e4m3fn)
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [BLOCK, BLOCK], layout)


@gluon.jit
def multiply_kernel(
    x_ptr,
    x_scale_ptr,
    weight_desc,
    scale_ptr,
    pair_ptr,
    tile_ptr,
    num_tiles_ptr,
    out_ptr,
    out_scale_ptr,
    num_blocks,
    num_out,
    size,
    num_turns,
    x_sixteenths,
    x_scale_stride,
    scale_expert_stride,
    scale_out_stride,
    alpha,
    limit,
    IS_GATED: gl.constexpr,
    IS_OAI: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    CHOSEN: gl.constexpr,
    DTYPE: gl.constexpr,
    TOGETHER: gl.constexpr,
    PIECES_TO_STAGGER: gl.constexpr,
    STEP: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program of as many as there is room for. Sixteenths tell the compiler that rows begin at multiples of 16."""
    gdc_launch_dependents()
    HALF: gl.constexpr = ROWS // 2
    OUT: gl.constexpr = gl.float8e4nv if IS_GATED else DTYPE
    x_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK], gl.float8e4nv)
    out_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK], OUT)
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    x_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, HALF, BLOCK], x_shared)
    weight_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, BLOCK, BLOCK], weight_desc.layout)
    out_smem = gl.allocate_shared_memory(OUT, [2, HALF, BLOCK], out_shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    begun = gl.allocate_shared_memory(gl.int64, [1, 1], bar_layout)
    for stage in gl.static_range(STAGES):
        # Each thread that copies rows, and the one that has weights copied.
        mbarrier.init(full.index(stage), count=32 * gl.num_warps() + 1)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(begun.index(0), count=1)
    fence_async_shared()
    gl.thread_barrier()

    work = (tile_ptr, num_tiles_ptr, pair_ptr, num_blocks, num_turns, size)
    inputs = (x_ptr, x_sixteenths, weight_desc, num_out)
    scales = (x_scale_ptr, scale_ptr, x_scale_stride, scale_expert_stride, scale_out_stride)
    results = (out_ptr, out_scale_ptr, alpha, limit)
    smem = (x_smem, weight_smem, out_smem)
    barriers = (full, empty, begun)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    work,
                    scales,
                    results,
                    smem,
                    barriers,
                    0,
                    DTYPE,
                    IS_GATED,
                    IS_OAI,
                    HAS_LIMIT,
                    CHOSEN,
                    TOGETHER,
                    PIECES_TO_STAGGER,
                ),
            ),
            (
                _multiply,
                (
                    work,
                    scales,
                    results,
                    smem,
                    barriers,
                    1,
                    DTYPE,
                    IS_GATED,
                    IS_OAI,
                    HAS_LIMIT,
                    CHOSEN,
                    TOGETHER,
                    PIECES_TO_STAGGER,
                ),
            ),
            (_load, (work, inputs, smem, barriers, IS_GATED, CHOSEN, TOGETHER, STEP)),
        ],
        [4, 4],
        [232, 40],
    )


@gluon.jit
def _tile(at, work):
    """What the list of tiles has for a piece of work, which may be one behind the last."""
    tile_ptr, num_tiles_ptr, pair_ptr, num_blocks, num_turns, size = work
    ptr = tile_ptr + at // num_blocks * 4
    return gl.load(ptr), gl.load(ptr + 1), gl.load(ptr + 2), gl.load(ptr + 3)


@gluon.jit
def _place(at, tile, num_blocks, ROWS: gl.constexpr, TOGETHER: gl.constexpr):
    """(expert, first row, row behind the expert's last, block of outputs) of a piece of work.

    As many tiles of an expert as are computed together take turns, so that they share weights in the cache.
    """
    expert, start, stop, expert_tile = tile
    ahead = at // num_blocks - expert_tile
    expert_start = start - ahead * ROWS
    group = ahead // TOGETHER * TOGETHER
    together = gl.minimum(gl.cdiv(stop - expert_start, ROWS) - group, TOGETHER)
    within = at - (expert_tile + group) * num_blocks
    return expert, expert_start + (group + within % together) * ROWS, stop, within // together


@gluon.jit
def _load(
    work,
    inputs,
    smem,
    barriers,
    IS_GATED: gl.constexpr,
    CHOSEN: gl.constexpr,
    TOGETHER: gl.constexpr,
    STEP: gl.constexpr,
):
    """Four warps: copy rows, and have weights copied.

    STEP: blocks of inputs that are asked for at a time. They are neighbours in memory, which answers two faster.
    """
    tile_ptr, num_tiles_ptr, pair_ptr, num_blocks, num_turns, size = work
    x_ptr, x_sixteenths, weight_desc, num_out = inputs
    x_smem, weight_smem, out_smem = smem
    full, empty, begun = barriers
    STAGES: gl.constexpr = x_smem.shape[0] // 2
    HALF: gl.constexpr = x_smem.shape[1]
    BLOCK: gl.constexpr = x_smem.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    row_in_half = gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    inside = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))[None, :]
    gdc_wait()
    num_pieces = gl.load(num_tiles_ptr) * num_blocks
    tile = _tile(gl.program_id(0), work)
    count = 0
    for at in range(gl.program_id(0), num_pieces, gl.num_programs(0)):
        expert, start, stop, block = _place(at, tile, num_blocks, 2 * HALF, TOGETHER)
        tile = _tile(gl.minimum(at + gl.num_programs(0), num_pieces - 1), work)
        line = expert * num_out + block * (BLOCK if IS_GATED else 2 * BLOCK)
        second_line = line + (size if IS_GATED else BLOCK)
        # Rows behind the last are not copied: what is computed from them is not stored.
        first_row = start + row_in_half
        second_row = first_row + HALF
        is_first_row = (first_row < stop)[:, None]
        is_second_row = (second_row < stop)[:, None]
        if IS_GATED:
            first_row = gl.load(pair_ptr + first_row, mask=first_row < stop, other=0) // CHOSEN
            second_row = gl.load(pair_ptr + second_row, mask=second_row < stop, other=0) // CHOSEN
        first_ptrs = x_ptr + first_row.to(gl.int64)[:, None] * (x_sixteenths * 16) + inside
        second_ptrs = x_ptr + second_row.to(gl.int64)[:, None] * (x_sixteenths * 16) + inside
        for turn in range(0, num_turns, STEP):
            for ahead in gl.static_range(STEP):
                if turn + ahead < num_turns:
                    stage = (count + ahead) % STAGES
                    mbarrier.wait(empty.index(stage), (((count + ahead) // STAGES) & 1) ^ 1)
                    mbarrier.expect(full.index(stage), 2 * BLOCK * BLOCK)
            for second in gl.static_range(2):
                for ahead in gl.static_range(STEP):
                    stage = (count + ahead) % STAGES
                    tma.async_copy_global_to_shared(
                        weight_desc,
                        [second_line if second else line, (turn + ahead) * BLOCK],
                        full.index(stage),
                        weight_smem.index(2 * stage + second),
                        pred=turn + ahead < num_turns,
                    )
            for ahead in gl.static_range(STEP):
                if turn + ahead < num_turns:
                    stage = count % STAGES
                    async_copy.async_copy_global_to_shared(
                        x_smem.index(2 * stage), first_ptrs + (turn + ahead) * BLOCK, mask=is_first_row
                    )
                    if start + HALF < stop:
                        async_copy.async_copy_global_to_shared(
                            x_smem.index(2 * stage + 1), second_ptrs + (turn + ahead) * BLOCK, mask=is_second_row
                        )
                    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
                    count += 1
    async_copy.wait_group(0)


@gluon.jit
def _multiply(
    work,
    scales,
    results,
    smem,
    barriers,
    MINE: gl.constexpr,
    DTYPE: gl.constexpr,
    IS_GATED: gl.constexpr,
    IS_OAI: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    CHOSEN: gl.constexpr,
    TOGETHER: gl.constexpr,
    PIECES_TO_STAGGER: gl.constexpr,
):
    """Four warps: half of the rows of a tile."""
    tile_ptr, num_tiles_ptr, pair_ptr, num_blocks, num_turns, size = work
    x_scale_ptr, scale_ptr, x_scale_stride, scale_expert_stride, scale_out_stride = scales
    out_ptr, out_scale_ptr, alpha, limit = results
    x_smem, weight_smem, out_smem = smem
    full, empty, begun = barriers
    STAGES: gl.constexpr = x_smem.shape[0] // 2
    HALF: gl.constexpr = x_smem.shape[1]
    BLOCK: gl.constexpr = x_smem.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    half_row = MINE * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, mma))
    mine_smem = out_smem.index(MINE)
    nothing = gl.zeros([HALF, BLOCK], gl.float32, layout=mma)
    gdc_wait()
    num_pieces = gl.load(num_tiles_ptr) * num_blocks
    first_at = gl.program_id(0)
    tile = _tile(first_at, work)
    if MINE:
        # Half of a tile's results are then stored while products for the other half fill the matrix units.
        mbarrier.wait(begun.index(0), 0, pred=num_pieces >= PIECES_TO_STAGGER * gl.num_programs(0))
    count = 0
    if first_at < num_pieces:
        place = _place(first_at, tile, num_blocks, 2 * HALF, TOGETHER)
        pair = _pairs(pair_ptr, half_row, place)
        for at in range(first_at, num_pieces, gl.num_programs(0)):
            # What the next one needs first is loaded before this one's results are stored.
            next_at = gl.minimum(at + gl.num_programs(0), num_pieces - 1)
            tile = _tile(next_at, work)
            expert, start, stop, block = place
            first = start + MINE * HALF
            if first < stop:
                source = pair // CHOSEN if IS_GATED else gl.minimum(start + half_row, stop - 1)
                x_scale_ptrs = x_scale_ptr + source.to(gl.int64) * x_scale_stride
                first_block = block if IS_GATED else 2 * block
                second_block = block + size // BLOCK if IS_GATED else gl.minimum(2 * block + 1, size // BLOCK - 1)
                expert_scale_ptr = scale_ptr + expert.to(gl.int64) * scale_expert_stride
                first_scale_ptr = expert_scale_ptr + first_block * scale_out_stride
                second_scale_ptr = expert_scale_ptr + second_block * scale_out_stride
                sums = gl.zeros([HALF, BLOCK], gl.float32, layout=mma)
                second_sums = gl.zeros([HALF, BLOCK], gl.float32, layout=mma)
                # Scales are loaded a turn before they are needed.
                x_scale = gl.load(x_scale_ptrs)
                scale = gl.load(first_scale_ptr)
                second_scale = gl.load(second_scale_ptr)
                for turn in range(num_turns):
                    stage = count % STAGES
                    mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                    fence_async_shared()
                    x = x_smem.index(2 * stage + MINE)
                    weight = weight_smem.index(2 * stage).permute((1, 0))
                    products = warpgroup_mma(x, weight, nothing, use_acc=False, is_async=True)
                    next_turn = gl.minimum(turn + 1, num_turns - 1)
                    next_x_scale = gl.load(x_scale_ptrs + next_turn)
                    next_scale = gl.load(first_scale_ptr + next_turn)
                    next_second_scale = gl.load(second_scale_ptr + next_turn)
                    products = warpgroup_mma_wait(0, deps=[products])
                    sums += products * (x_scale * scale)[:, None]
                    # Waits for nothing: it keeps the compiler from needing registers for two products at a time.
                    sums = warpgroup_mma_wait(0, deps=[sums])
                    weight = weight_smem.index(2 * stage + 1).permute((1, 0))
                    products = warpgroup_mma(x, weight, nothing, use_acc=False, is_async=True)
                    products = warpgroup_mma_wait(0, deps=[products])
                    mbarrier.arrive(empty.index(stage))
                    second_sums += products * (x_scale * second_scale)[:, None]
                    x_scale = next_x_scale
                    scale = next_scale
                    second_scale = next_second_scale
                    if MINE == 0:
                        mbarrier.arrive(begun.index(0), pred=count == 1)
                    count += 1
                place = _place(next_at, tile, num_blocks, 2 * HALF, TOGETHER)
                next_pair = _pairs(pair_ptr, half_row, place)
                if IS_GATED:
                    store_activated(
                        sums, second_sums, mine_smem, results, first, stop, block, size, DTYPE, IS_OAI, HAS_LIMIT
                    )
                else:
                    store_rows(sums, pair, mine_smem, out_ptr, first, stop, 2 * block, size)
                    store_rows(second_sums, pair, mine_smem, out_ptr, first, stop, 2 * block + 1, size)
                pair = next_pair
            else:
                for _ in range(num_turns):
                    stage = count % STAGES
                    mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                    mbarrier.arrive(empty.index(stage))
                    count += 1
                place = _place(next_at, tile, num_blocks, 2 * HALF, TOGETHER)
                pair = _pairs(pair_ptr, half_row, place)


@gluon.jit
def _pairs(pair_ptr, half_row, place):
    """Of rows of a tile; those behind the last are the last's."""
    expert, start, stop, block = place
    return gl.load(pair_ptr + gl.minimum(start + half_row, stop - 1))
