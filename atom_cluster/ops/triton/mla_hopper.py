"""Attention to cached latents on sm_90: what `mla_absorbed` computes, by warps with different tasks.

Four warps copy latents to shared memory, two blocks of keys at a time, each as two halves of its dims. Two times four
warps have the same queries: each computes the scores of one of the blocks and half of the dims of all mixtures, so that
nothing is computed twice; of the other's scores they get the weights. While the first are at their softmax, the others'
products fill the matrix units. A half of a block is loaded anew as soon as the product that reads it last is there.
Sixteen-bit numbers and powers of two only. Written in Gluon, which Triton calls experimental; `mla_absorbed` does
without.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from atom_cluster.ops.attention import KvLayerCache
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.runtime import varying

NUM_QUERIES = 64
NUM_KEYS = 128
"""Of both blocks."""

NUM_WARPS = 4
"""Of one task: there are three."""

HAS_TASKS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
"""Whether this Triton has warps with different tasks as they are asked for here."""


def is_fit(dtype: torch.dtype, latent_dim: int, rope_dim: int, kv: KvLayerCache) -> bool:
    """Whether the kernel can be used."""
    strides = kv.key.stride()
    return (
        runtime.is_hopper()
        and HAS_TASKS
        and dtype.itemsize == 2
        and kv.key.dtype == dtype
        and latent_dim in (256, 512)
        and rope_dim == 64
        and strides[0] % 8 == 0
        and strides[1] % 8 == 0
        and kv.key.data_ptr() % 16 == 0
    )


@gluon.jit(
    **varying(
        "table_row_ptr", "length_ptr", "query_start_ptr", "block_start_ptr", "num_rows", "first_token", "table_stride"
    )
)
def attend_kernel(
    query_ptr,
    rope_ptr,
    cache_ptr,
    table_ptr,
    table_row_ptr,
    length_ptr,
    selected_ptr,
    query_start_ptr,
    block_start_ptr,
    out_ptr,
    piece_ptr,
    weight_ptr,
    num_rows,
    first_token,
    out_head_stride,
    out_token_stride,
    scale,
    value_scale,
    query_head_stride,
    query_token_stride,
    rope_token_stride,
    rope_head_stride,
    page_eighths,
    entry_eighths,
    table_stride,
    selected_stride,
    H: gl.constexpr,
    L: gl.constexpr,
    P: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    IS_SPARSE: gl.constexpr,
    MIN_BLOCKS: gl.constexpr,
    ROW_BLOCK: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """One program: a tile of queries of every row that its part of the blocks touches."""
    HALF: gl.constexpr = L // 2
    KEYS: gl.constexpr = BLOCK_N // 2
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    latent_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, HALF], dtype)
    rope_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, P], dtype)
    row_layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    line_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()

    part = gl.program_id(1)
    total = gl.load(block_start_ptr + num_rows)
    num_parts = gl.minimum(gl.num_programs(1), gl.maximum(total // MIN_BLOCKS, 1))
    block = (part.to(gl.int64) * total // num_parts).to(gl.int32)
    end = ((part + 1).to(gl.int64) * total // num_parts).to(gl.int32)
    if part >= num_parts:
        end = block

    # The last row that begins at or before the part's first block; rows without blocks are before it.
    row = -1
    for first in range(0, num_rows, ROW_BLOCK):
        at = first + gl.arange(0, ROW_BLOCK, layout=row_layout)
        begins = gl.load(block_start_ptr + at, mask=at < num_rows, other=0x7FFFFFFF)
        row += gl.sum((begins <= block).to(gl.int32), axis=0)

    q_latent_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HALF], latent_shared)
    q_rope_smem = gl.allocate_shared_memory(dtype, [BLOCK_M, P], rope_shared)
    # [2 * block of keys + half of the dims]
    latent_smem = gl.allocate_shared_memory(dtype, [4, KEYS, HALF], latent_shared)
    rope_smem = gl.allocate_shared_memory(dtype, [2, KEYS, P], rope_shared)
    line_smem = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], line_layout)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], bar_layout)
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], bar_layout)
    # Queries are there, and may be replaced; weights and maxima of one four warps are there for the other.
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], bar_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], bar_layout)
    told = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    for index in gl.static_range(4):
        mbarrier.init(full.index(index), count=32 * gl.num_warps())
        mbarrier.init(empty.index(index), count=1)
    mbarrier.init(q_full.index(0), count=32 * gl.num_warps())
    mbarrier.init(q_empty.index(0), count=2)
    mbarrier.init(told.index(0), count=1)
    mbarrier.init(told.index(1), count=1)
    fence_async_shared()
    gl.thread_barrier()

    work = (row, block, end, num_rows, first_token, part)
    rows = (block_start_ptr, length_ptr, query_start_ptr)
    smem = (q_latent_smem, q_rope_smem, latent_smem, rope_smem, line_smem)
    barriers = (full, empty, q_full, q_empty, told)
    results = (out_ptr, piece_ptr, weight_ptr, out_head_stride, out_token_stride, scale, value_scale)
    queries = (query_ptr, rope_ptr, query_head_stride, query_token_stride, rope_token_stride, rope_head_stride)
    cache = (
        cache_ptr,
        table_ptr,
        table_row_ptr,
        selected_ptr,
        page_eighths,
        entry_eighths,
        table_stride,
        selected_stride,
    )
    gl.warp_specialize(
        [
            (_attend, (work, rows, results, smem, barriers, 0, H, IS_SPARSE)),
            (_attend, (work, rows, results, smem, barriers, 1, H, IS_SPARSE)),
            (_load, (work, rows, queries, cache, smem, barriers, H, BLOCK_SIZE, IS_SPARSE)),
        ],
        [4, 4],
        [216, 72],
    )


@gluon.jit
def _row(rows, row, first_token, IS_SPARSE: gl.constexpr):
    """(first block, last block + 1, entries, first token, tokens) of a row."""
    block_start_ptr, length_ptr, query_start_ptr = rows
    length = gl.load(length_ptr + row)
    if IS_SPARSE:
        token = first_token + row
        num_tokens = length * 0 + 1
    else:
        token = gl.load(query_start_ptr + row)
        num_tokens = gl.load(query_start_ptr + row + 1) - token
    return gl.load(block_start_ptr + row), gl.load(block_start_ptr + row + 1), length, token, num_tokens


@gluon.jit
def _load(
    work, rows, queries, cache, smem, barriers, H: gl.constexpr, BLOCK_SIZE: gl.constexpr, IS_SPARSE: gl.constexpr
):
    """Four warps: copy queries and latents."""
    row, block, end, num_rows, first_token, part = work
    query_ptr, rope_ptr, query_head_stride, query_token_stride, rope_token_stride, rope_head_stride = queries
    cache_ptr, table_ptr, table_row_ptr, selected_ptr, page_eighths, entry_eighths, table_stride, selected_stride = (
        cache
    )
    q_latent_smem, q_rope_smem, latent_smem, rope_smem, line_smem = smem
    full, empty, q_full, q_empty, told = barriers
    BLOCK_M: gl.constexpr = q_latent_smem.shape[1]
    HALF: gl.constexpr = q_latent_smem.shape[2]
    P: gl.constexpr = q_rope_smem.shape[1]
    KEYS: gl.constexpr = latent_smem.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    query_in_tile = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    entry = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    half_dim = gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))[None, :]
    rope_dim = gl.arange(0, P, layout=gl.SliceLayout(0, layout))[None, :]
    tile = gl.program_id(0)
    phase = 0
    q_phase = 0
    while block < end:
        row_begin, row_end, length, token, num_tokens = _row(rows, row, first_token, IS_SPARSE)
        until = gl.minimum(end, row_end)
        if (until > block) & (tile * BLOCK_M < num_tokens * H):
            table_row = gl.load(table_row_ptr + row) if IS_SPARSE else row
            row_table_ptr = table_ptr + table_row.to(gl.int64) * table_stride
            row_selected_ptr = selected_ptr + token.to(gl.int64) * selected_stride
            position = (block - row_begin) * (2 * KEYS) + entry
            slot = _slots(row_table_ptr, row_selected_ptr, position, length, BLOCK_SIZE, IS_SPARSE)
            query = tile * BLOCK_M + query_in_tile
            is_query = (query < num_tokens * H)[:, None]
            at_token = (token + query // H).to(gl.int64)
            head = (query % H).to(gl.int64)
            q_ptrs = query_ptr + (head * query_head_stride + (at_token - first_token) * query_token_stride)[:, None]
            r_ptrs = rope_ptr + (at_token * rope_token_stride + head * rope_head_stride)[:, None]
            mbarrier.wait(q_empty.index(0), q_phase ^ 1)
            async_copy.async_copy_global_to_shared(q_latent_smem.index(0), q_ptrs + half_dim, mask=is_query)
            async_copy.async_copy_global_to_shared(q_latent_smem.index(1), q_ptrs + HALF + half_dim, mask=is_query)
            async_copy.async_copy_global_to_shared(q_rope_smem, r_ptrs + rope_dim, mask=is_query)
            async_copy.mbarrier_arrive(q_full.index(0), increment_count=False)
            q_phase ^= 1
            for _ in range(block, until):
                for which in gl.static_range(2):
                    is_entry = (position < length)[:, None]
                    place = (slot // BLOCK_SIZE).to(gl.int64) * (page_eighths * 8)
                    place += (slot % BLOCK_SIZE) * (entry_eighths * 8)
                    ptrs = cache_ptr + place[:, None]
                    position += KEYS
                    slot = _slots(row_table_ptr, row_selected_ptr, position, length, BLOCK_SIZE, IS_SPARSE)
                    for half in gl.static_range(2):
                        mbarrier.wait(empty.index(2 * which + half), phase ^ 1)
                        async_copy.async_copy_global_to_shared(
                            latent_smem.index(2 * which + half), ptrs + half * HALF + half_dim, mask=is_entry
                        )
                        # The four warps that free a half of the dims are those that read the other's weights last,
                        # which are where positional keys were.
                        if half != which:
                            async_copy.async_copy_global_to_shared(
                                rope_smem.index(which), ptrs + 2 * HALF + rope_dim, mask=is_entry
                            )
                        async_copy.mbarrier_arrive(full.index(2 * which + half), increment_count=False)
                phase ^= 1
        block = until
        row += 1
    async_copy.wait_group(0)


@gluon.jit
def _attend(work, rows, results, smem, barriers, MINE: gl.constexpr, H: gl.constexpr, IS_SPARSE: gl.constexpr):
    """Four warps: scores of one block of two, half of the dims of mixtures."""
    row, block, end, num_rows, first_token, part = work
    out_ptr, piece_ptr, weight_ptr, out_head_stride, out_token_stride, scale, value_scale = results
    q_latent_smem, q_rope_smem, latent_smem, rope_smem, line_smem = smem
    full, empty, q_full, q_empty, told = barriers
    OTHER: gl.constexpr = 1 - MINE
    BLOCK_M: gl.constexpr = q_latent_smem.shape[1]
    HALF: gl.constexpr = q_latent_smem.shape[2]
    KEYS: gl.constexpr = latent_smem.shape[1]
    dtype: gl.constexpr = q_rope_smem.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    mixed_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, mixed_layout, 2)
    score_line: gl.constexpr = gl.SliceLayout(1, score_layout)
    mixed_line: gl.constexpr = gl.SliceLayout(1, mixed_layout)
    tile = gl.program_id(0)
    query_s = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=score_line)
    query_m = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=mixed_line)
    entry = gl.arange(0, KEYS, layout=gl.SliceLayout(0, score_layout))
    mixed_dim = MINE * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, mixed_layout))
    no_scores = gl.zeros([BLOCK_M, KEYS], gl.float32, layout=score_layout)
    key_low = latent_smem.index(2 * MINE)
    key_high = latent_smem.index(2 * MINE + 1)
    key_rope = rope_smem.index(MINE)
    value_mine = latent_smem.index(2 * MINE + MINE)
    value_other = latent_smem.index(2 * OTHER + MINE)
    weight_mine = rope_smem.index(MINE)
    weight_other = rope_smem.index(OTHER)
    phase = 0
    told_phase = 0
    q_phase = 0
    while block < end:
        row_begin, row_end, length, token, num_tokens = _row(rows, row, first_token, IS_SPARSE)
        until = gl.minimum(end, row_end)
        if (until > block) & (tile * BLOCK_M < num_tokens * H):
            if IS_SPARSE:
                seen = query_s * 0 + length
            else:
                seen = length - num_tokens + 1 + query_s // H
            position = (block - row_begin) * (2 * KEYS) + MINE * KEYS + entry
            # The highest of all blocks before; the first four warps' is told to the others, whose is told back.
            highest = gl.full([BLOCK_M], -1.0e30, gl.float32, layout=score_line)
            total_weight = gl.zeros([BLOCK_M], gl.float32, layout=score_line)
            mixed = gl.zeros([BLOCK_M, HALF], gl.float32, layout=mixed_layout)
            mbarrier.wait(q_full.index(0), q_phase)
            q_phase ^= 1
            for at_block in range(block, until):
                mbarrier.wait(full.index(2 * MINE), phase)
                mbarrier.wait(full.index(2 * MINE + 1), phase)
                fence_async_shared()
                scores = warpgroup_mma(
                    q_latent_smem.index(0), key_low.permute((1, 0)), no_scores, use_acc=False, is_async=True
                )
                scores = warpgroup_mma(q_latent_smem.index(1), key_high.permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma(q_rope_smem, key_rope.permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                mbarrier.arrive(q_empty.index(0), pred=at_block + 1 == until)
                scores = gl.where(position[None, :] < seen[:, None], scores * scale, float("-inf"))
                position += 2 * KEYS
                if MINE == 0:
                    first_highest = gl.maximum(highest, gl.max(scores, axis=1))
                    weight = gl.exp2(scores - first_highest[:, None])
                    line_smem.index(0).store(first_highest)
                    rounded = weight.to(dtype)
                    weight_mine.store(rounded)
                    fence_async_shared()
                    mbarrier.arrive(told.index(0))
                    kept = gl.exp2(highest - first_highest)
                    mixed = mixed * gl.convert_layout(kept, mixed_line)[:, None]
                    mixed = warpgroup_mma(gl.convert_layout(rounded, weight_layout), value_mine, mixed, is_async=True)
                    total_weight = total_weight * kept + gl.sum(weight, axis=1)
                    mixed = warpgroup_mma_wait(0, deps=[mixed])
                    mbarrier.arrive(empty.index(0))
                    mbarrier.wait(told.index(1), told_phase)
                    new_highest = line_smem.index(1).load(score_line)
                    kept = gl.exp2(first_highest - new_highest)
                    mixed = mixed * gl.convert_layout(kept, mixed_line)[:, None]
                    total_weight = total_weight * kept
                    mbarrier.wait(full.index(2), phase)
                    fence_async_shared()
                    mixed = warpgroup_mma(weight_other, value_other, mixed, is_async=True)
                    mixed = warpgroup_mma_wait(0, deps=[mixed])
                    mbarrier.arrive(empty.index(2))
                else:
                    own_highest = gl.max(scores, axis=1)
                    mbarrier.wait(told.index(0), told_phase)
                    first_highest = line_smem.index(0).load(score_line)
                    new_highest = gl.maximum(first_highest, own_highest)
                    kept = gl.exp2(highest - first_highest)
                    mixed = mixed * gl.convert_layout(kept, mixed_line)[:, None]
                    mbarrier.wait(full.index(1), phase)
                    fence_async_shared()
                    mixed = warpgroup_mma(weight_other, value_other, mixed, is_async=True)
                    weight = gl.exp2(scores - new_highest[:, None])
                    line_smem.index(1).store(new_highest)
                    rounded = weight.to(dtype)
                    weight_mine.store(rounded)
                    fence_async_shared()
                    mbarrier.arrive(told.index(1))
                    total_weight = total_weight * gl.exp2(highest - new_highest) + gl.sum(weight, axis=1)
                    kept = gl.exp2(first_highest - new_highest)
                    mixed = warpgroup_mma_wait(0, deps=[mixed])
                    mbarrier.arrive(empty.index(1))
                    mixed = mixed * gl.convert_layout(kept, mixed_line)[:, None]
                    mixed = warpgroup_mma(gl.convert_layout(rounded, weight_layout), value_mine, mixed, is_async=True)
                    mixed = warpgroup_mma_wait(0, deps=[mixed])
                    mbarrier.arrive(empty.index(3))
                highest = new_highest
                phase ^= 1
                told_phase ^= 1
            # Each has summed up its own blocks' weights, relative to the same highest. The others answer the first.
            if MINE == 0:
                line_smem.index(0).store(total_weight)
                mbarrier.arrive(told.index(0))
            mbarrier.wait(told.index(OTHER), told_phase)
            other_weight = line_smem.index(OTHER).load(score_line)
            if MINE == 1:
                line_smem.index(1).store(total_weight)
                mbarrier.arrive(told.index(1))
            total_weight += other_weight
            told_phase ^= 1
            factor = value_scale / gl.where(total_weight > 0, total_weight, 1.0)
            mixed = mixed * gl.convert_layout(factor, mixed_line)[:, None]
            if (block == row_begin) & (until == row_end):
                local_token = (token - first_token + query_m // H).to(gl.int64)
                target = (query_m % H).to(gl.int64) * out_head_stride + local_token * out_token_stride
                gl.store(
                    out_ptr + target[:, None] + mixed_dim[None, :],
                    mixed.to(dtype),
                    mask=(query_m < num_tokens * H)[:, None],
                )
            else:
                # A part has at most two: of a row that began before it, and of one that goes on behind it.
                piece = 2 * part + (block == row_begin).to(gl.int32)
                first_query = piece.to(gl.int64) * (gl.num_programs(0) * BLOCK_M)
                at_piece = first_query + query_m
                gl.store(piece_ptr + at_piece[:, None] * (2 * HALF) + mixed_dim[None, :], mixed)
                if MINE == 0:
                    logarithm = gl.where(total_weight > 0, highest + gl.log2(total_weight), -1.0e30)
                    gl.store(weight_ptr + first_query + query_s, logarithm)
        block = until
        row += 1


@gluon.jit
def _slots(table_ptr, selected_ptr, position, length, BLOCK_SIZE: gl.constexpr, IS_SPARSE: gl.constexpr):
    """Page times block size plus offset of the entries at these positions of a row, or of its selection."""
    is_entry = position < length
    if IS_SPARSE:
        position = gl.load(selected_ptr + position, mask=is_entry, other=0)
    return gl.load(table_ptr + position // BLOCK_SIZE, mask=is_entry, other=0) * BLOCK_SIZE + position % BLOCK_SIZE
