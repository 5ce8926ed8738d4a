"""Attention to expanded keys and values on sm_90: what `mla_expanded` computes, by warps with different tasks.

One warp has tiles of keys and values copied to shared memory as room becomes free there. Two times four warps have 64
queries each: while their products with values are computed, they work on the scores of the next keys, and while one
four are at that, the other's products fill the matrix units. Dims of DeepSeek's heads and sixteen-bit numbers only.
Knows no weights and no layers.

Shape suffixes as in `mla_expanded`.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.bulk_copies import box_layout
from atom_cluster.ops.triton.mla_hopper import HAS_TASKS
from atom_cluster.ops.triton.runtime import varying

BLOCK_M = 128
BLOCK_N = 128
STAGES = 2
GL_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def is_fit(
    query_THN: torch.Tensor,
    rope_THP: torch.Tensor,
    key_CHN: torch.Tensor,
    rope_CP: torch.Tensor,
    value_CHV: torch.Tensor,
    out_THV: torch.Tensor,
) -> bool:
    """Whether the kernel can be used."""
    return (
        runtime.is_hopper()
        and HAS_TASKS
        and query_THN.dtype in GL_TYPES
        and (query_THN.shape[-1], rope_CP.shape[-1], value_CHV.shape[-1]) == (128, 64, 128)
        and all(
            stride % 8 == 0 for x in (query_THN, rope_THP, key_CHN, value_CHV, out_THV) for stride in x.stride()[:2]
        )
        and rope_CP.stride(0) % 8 == 0
        and all(x.data_ptr() % 16 == 0 for x in (key_CHN, rope_CP, value_CHV))
    )


def attend(
    query_THN: torch.Tensor,
    rope_THP: torch.Tensor,
    key_CHN: torch.Tensor,
    rope_CP: torch.Tensor,
    value_CHV: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    place_start: torch.Tensor,
    *,
    max_queries: int,
    scale_log2: float,
    out_THV: torch.Tensor,
) -> None:
    """Fill in the rows' part of `out_THV`. The rest is as in `mla_expanded.attend_expanded`."""
    num_heads = key_CHN.shape[1]
    num_tiles = triton.cdiv(max_queries, BLOCK_M)
    # The longest and the shortest tile of a row are one program's, where there are enough of them.
    num_pairs = triton.cdiv(num_tiles, 2)
    enough = 2 * runtime.num_multiprocessors(query_THN.device)
    turns = 2 if num_pairs * num_heads * len(context_len) >= enough else 1
    attend_kernel[(num_pairs if turns == 2 else num_tiles, num_heads, len(context_len))](
        query_THN,
        rope_THP,
        _tiles_of(key_CHN),
        _tiles_of(rope_CP),
        _tiles_of(value_CHV),
        out_THV,
        query_start,
        context_len,
        place_start,
        scale_log2,
        turns,
        query_THN.stride(0) // 8,
        query_THN.stride(1) // 8,
        rope_THP.stride(0) // 8,
        rope_THP.stride(1) // 8,
        key_CHN.stride(1),
        value_CHV.stride(1),
        out_THV.stride(0) // 8,
        out_THV.stride(1) // 8,
        N=key_CHN.shape[-1],
        P=rope_CP.shape[-1],
        V=value_CHV.shape[-1],
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        STAGES=STAGES,
        num_warps=4,
    )


def _tiles_of(x: torch.Tensor) -> TensorDescriptor:
    """Of [C, D] or [C, heads, D]: heads are a stride apart in what is one line of the descriptor."""
    width = x.shape[-1] + (x.shape[1] - 1) * x.stride(1) if x.ndim == 3 else x.shape[1]
    layout = box_layout(BLOCK_N, x.shape[-1], x.dtype)
    return TensorDescriptor(x, [len(x), width], [x.stride(0), 1], [BLOCK_N, x.shape[-1]], layout)


@gluon.jit(**varying("query_start_ptr", "context_len_ptr", "place_start_ptr", "turns"))
def attend_kernel(
    query_ptr,
    query_rope_ptr,
    key_desc,
    key_rope_desc,
    value_desc,
    out_ptr,
    query_start_ptr,
    context_len_ptr,
    place_start_ptr,
    scale,
    turns,
    query_token_eighths,
    query_head_eighths,
    query_rope_token_eighths,
    query_rope_head_eighths,
    key_head_stride,
    value_head_stride,
    out_token_eighths,
    out_head_eighths,
    N: gl.constexpr,
    P: gl.constexpr,
    V: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program: a tile of a row's queries, or with two turns the n-th longest and the n-th shortest; one head.

    Eighths of strides tell the compiler that these are multiples of eight.
    """
    row = gl.program_id(2)
    head = gl.program_id(1)
    token = gl.load(query_start_ptr + row)
    num_queries = gl.load(query_start_ptr + row + 1) - token
    num_cached = gl.load(context_len_ptr + row) - num_queries
    place = gl.load(place_start_ptr + row)
    num_tiles = gl.cdiv(num_queries, BLOCK_M)
    first_tile = num_tiles - 1 - gl.program_id(0)
    second_tile = gl.program_id(0)
    if turns == 1:
        second_tile = first_tile
    if (first_tile < 0) | (first_tile < second_tile):
        return
    num_turns = gl.where(second_tile < first_tile, 2, 1)

    dtype: gl.constexpr = query_ptr.dtype.element_ty
    HALF: gl.constexpr = BLOCK_M // 2
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, N], dtype)
    q_rope_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, P], dtype)
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(dtype, [2, HALF, N], q_layout)
    q_rope_smem = gl.allocate_shared_memory(dtype, [2, HALF, P], q_rope_layout)
    key_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, N], key_desc.layout)
    rope_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, P], key_rope_desc.layout)
    value_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, V], value_desc.layout)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=2)
        mbarrier.init(value_empty.index(stage), count=2)
    fence_async_shared()
    gl.thread_barrier()

    tiles = (first_tile, second_tile, num_turns, num_queries, num_cached)
    barriers = (key_full, key_empty, value_full, value_empty)
    stages = (key_smem, rope_smem, value_smem)
    q_ptr = query_ptr + token.to(gl.int64) * (query_token_eighths * 8) + head.to(gl.int64) * (query_head_eighths * 8)
    q_rope_ptr = (
        query_rope_ptr
        + token.to(gl.int64) * (query_rope_token_eighths * 8)
        + head.to(gl.int64) * (query_rope_head_eighths * 8)
    )
    o_ptr = out_ptr + token.to(gl.int64) * (out_token_eighths * 8) + head.to(gl.int64) * (out_head_eighths * 8)
    memory = (q_ptr, q_rope_ptr, o_ptr, query_token_eighths, query_rope_token_eighths, out_token_eighths)
    gl.warp_specialize(
        [
            (_attend, (memory, tiles, scale, q_smem.index(0), q_rope_smem.index(0), stages, barriers, 0, BLOCK_M)),
            (_attend, (memory, tiles, scale, q_smem.index(1), q_rope_smem.index(1), stages, barriers, HALF, BLOCK_M)),
            (
                _load,
                (
                    key_desc,
                    key_rope_desc,
                    value_desc,
                    place,
                    head * key_head_stride,
                    head * value_head_stride,
                    tiles,
                    stages,
                    barriers,
                    BLOCK_M,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _num_blocks(tile, num_queries, num_cached, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of keys that some query of the tile sees."""
    return gl.cdiv(num_cached + gl.minimum((tile + 1) * BLOCK_M, num_queries), BLOCK_N)


@gluon.jit
def _load(
    key_desc,
    key_rope_desc,
    value_desc,
    place,
    key_column,
    value_column,
    tiles,
    stages,
    barriers,
    BLOCK_M: gl.constexpr,
):
    """One warp: has the blocks copied, the last first."""
    first_tile, second_tile, num_turns, num_queries, num_cached = tiles
    key_smem, rope_smem, value_smem = stages
    key_full, key_empty, value_full, value_empty = barriers
    BLOCK_N: gl.constexpr = key_smem.shape[1]
    STAGES: gl.constexpr = key_smem.shape[0]
    count = 0
    for turn in range(num_turns):
        tile = gl.where(turn == 0, first_tile, second_tile)
        num_blocks = _num_blocks(tile, num_queries, num_cached, BLOCK_M, BLOCK_N)
        for done in range(num_blocks):
            at = place + (num_blocks - 1 - done) * BLOCK_N
            stage = count % STAGES
            phase = (count // STAGES) & 1
            mbarrier.wait(key_empty.index(stage), phase ^ 1)
            full = key_full.index(stage)
            mbarrier.expect(full, key_desc.block_type.nbytes + key_rope_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(key_desc, [at, key_column], full, key_smem.index(stage))
            tma.async_copy_global_to_shared(key_rope_desc, [at, 0], full, rope_smem.index(stage))
            mbarrier.wait(value_empty.index(stage), phase ^ 1)
            full = value_full.index(stage)
            mbarrier.expect(full, value_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(value_desc, [at, value_column], full, value_smem.index(stage))
            count += 1


@gluon.jit
def _attend(
    memory,
    tiles,
    scale,
    q_smem,
    q_rope_smem,
    stages,
    barriers,
    FIRST: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """Four warps: half of the queries of a tile, from `FIRST` on."""
    q_ptr, q_rope_ptr, o_ptr, q_eighths, q_rope_eighths, o_eighths = memory
    first_tile, second_tile, num_turns, num_queries, num_cached = tiles
    key_smem, rope_smem, value_smem = stages
    key_full, key_empty, value_full, value_empty = barriers
    M: gl.constexpr = q_smem.shape[0]
    N: gl.constexpr = q_smem.shape[1]
    P: gl.constexpr = q_rope_smem.shape[1]
    V: gl.constexpr = value_smem.shape[2]
    BLOCK_N: gl.constexpr = key_smem.shape[1]
    STAGES: gl.constexpr = key_smem.shape[0]
    dtype: gl.constexpr = q_smem.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    mixed_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, mixed_layout, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // N, N // 8], [4, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // P, P // 8], [4, 1], [1, 0])
    m_wide = gl.arange(0, M, layout=gl.SliceLayout(1, wide))
    m_narrow = gl.arange(0, M, layout=gl.SliceLayout(1, narrow))
    m_score = gl.arange(0, M, layout=gl.SliceLayout(1, score_layout))
    entry = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, score_layout))
    dim_wide = gl.arange(0, N, layout=gl.SliceLayout(0, wide))[None, :]
    dim_narrow = gl.arange(0, P, layout=gl.SliceLayout(0, narrow))[None, :]
    no_scores = gl.zeros([M, BLOCK_N], gl.float32, layout=score_layout)
    count = 0
    for turn in range(num_turns):
        tile = gl.where(turn == 0, first_tile, second_tile)
        first = tile * BLOCK_M + FIRST
        num_blocks = _num_blocks(tile, num_queries, num_cached, BLOCK_M, BLOCK_N)
        is_query = (first + m_wide < num_queries)[:, None]
        q_offset = (first + m_wide).to(gl.int64) * (q_eighths * 8)
        q = gl.load(q_ptr + q_offset[:, None] + dim_wide, mask=is_query, other=0.0)
        q_rope_offset = (first + m_narrow).to(gl.int64) * (q_rope_eighths * 8)
        q_rope = gl.load(
            q_rope_ptr + q_rope_offset[:, None] + dim_narrow,
            mask=(first + m_narrow < num_queries)[:, None],
            other=0.0,
        )
        gl.thread_barrier()
        q_smem.store(q)
        q_rope_smem.store(q_rope)
        fence_async_shared()
        gl.thread_barrier()
        sees = num_cached + first + m_score

        stage = count % STAGES
        mbarrier.wait(key_full.index(stage), (count // STAGES) & 1)
        scores = warpgroup_mma(q_smem, key_smem.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma(q_rope_smem, rope_smem.index(stage).permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(key_empty.index(stage))
        position = (num_blocks - 1) * BLOCK_N + entry
        scores = gl.where(position[None, :] <= sees[:, None], scores, float("-inf"))
        highest = gl.maximum(gl.max(scores, axis=1) * scale, -1.0e30)
        weight = gl.exp2(scores * scale - highest[:, None])
        total = gl.sum(weight, axis=1)
        mixed = gl.zeros([M, V], gl.float32, layout=mixed_layout)
        rounded = gl.convert_layout(weight.to(dtype), weight_layout)

        num_whole = gl.minimum((num_cached + first + 1) // BLOCK_N, num_blocks - 1)
        for is_whole in gl.static_range(2):
            # Blocks that are masked, then those that are not.
            begin = num_whole if is_whole else num_blocks - 1
            end = 0 if is_whole else num_whole
            for done in range(begin - end):
                value_stage = stage
                value_phase = (count // STAGES) & 1
                count += 1
                stage = count % STAGES
                mbarrier.wait(key_full.index(stage), (count // STAGES) & 1)
                scores = warpgroup_mma(
                    q_smem, key_smem.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
                )
                scores = warpgroup_mma(q_rope_smem, rope_smem.index(stage).permute((1, 0)), scores, is_async=True)
                mbarrier.wait(value_full.index(value_stage), value_phase)
                mixed = warpgroup_mma(rounded, value_smem.index(value_stage), mixed, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(key_empty.index(stage))
                if not is_whole:
                    position = (begin - 1 - done) * BLOCK_N + entry
                    scores = gl.where(position[None, :] <= sees[:, None], scores, float("-inf"))
                new_highest = gl.maximum(highest, gl.max(scores, axis=1) * scale)
                weight = gl.exp2(scores * scale - new_highest[:, None])
                kept = gl.exp2(highest - new_highest)
                total = total * kept + gl.sum(weight, axis=1)
                highest = new_highest
                mixed = warpgroup_mma_wait(0, deps=[mixed])
                mbarrier.arrive(value_empty.index(value_stage))
                mixed = mixed * gl.convert_layout(kept, gl.SliceLayout(1, mixed_layout))[:, None]
                rounded = gl.convert_layout(weight.to(dtype), weight_layout)
        mbarrier.wait(value_full.index(stage), (count // STAGES) & 1)
        mixed = warpgroup_mma(rounded, value_smem.index(stage), mixed, is_async=True)
        mixed = warpgroup_mma_wait(0, deps=[mixed])
        mbarrier.arrive(value_empty.index(stage))
        count += 1

        mixed = mixed * gl.convert_layout(1.0 / total, gl.SliceLayout(1, mixed_layout))[:, None]
        # Queries' place is free: lines are written as wholes.
        gl.thread_barrier()
        q_smem.store(mixed.to(dtype))
        gl.thread_barrier()
        o_offset = (first + m_wide).to(gl.int64) * (o_eighths * 8)
        gl.store(o_ptr + o_offset[:, None] + dim_wide, q_smem.load(wide), mask=is_query)
