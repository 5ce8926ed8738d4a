"""Attention to cached latents on sm_90: what `mla_absorbed` computes, with loads and matrix units scheduled by hand.

A block of latents is loaded while the one before it is worked on, from its first product to its last; the compiler's
own pipeline loads it during the last product alone. Sixteen-bit numbers and powers of two only. Written in Gluon, which
Triton calls experimental; `mla_absorbed` does without.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from atom_cluster.ops.attention import KvLayerCache
from atom_cluster.ops.triton import runtime

NUM_QUERIES = 64
NUM_KEYS = 64
NUM_WARPS = 8


def is_fit(dtype: torch.dtype, latent_dim: int, rope_dim: int, kv: KvLayerCache) -> bool:
    """Whether the kernel can be used."""
    strides = kv.key.stride()
    return (
        runtime.is_hopper()
        and dtype.itemsize == 2
        and kv.key.dtype == dtype
        and latent_dim in (256, 512)
        and rope_dim in (32, 64)
        and strides[0] % 8 == 0
        and strides[1] % 8 == 0
        and kv.key.data_ptr() % 16 == 0
    )


@gluon.jit
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
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // P, P // 8], [gl.num_warps(), 1], [1, 0])
    # Every four warps compute all scores: as narrow as a share of them would be, products would take as long, and the
    # warps would have to tell each other their maxima.
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    mixed_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, L // 2, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, mixed_layout, 2)
    latent_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, L], gl.bfloat16)
    rope_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, P], gl.bfloat16)
    row_layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    dtype: gl.constexpr = query_ptr.dtype.element_ty

    tile = gl.program_id(0)
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

    q_latent_smem = gl.allocate_shared_memory(dtype, [BLOCK_M, L], latent_shared)
    q_rope_smem = gl.allocate_shared_memory(dtype, [BLOCK_M, P], rope_shared)
    latent_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_N, L], latent_shared)
    rope_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_N, P], rope_shared)

    query_w = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, wide))
    query_n = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, narrow))
    query_s = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, score_layout))
    query_m = tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, mixed_layout))
    latent_dim = gl.arange(0, L, layout=gl.SliceLayout(0, wide))
    rope_dim = gl.arange(0, P, layout=gl.SliceLayout(0, narrow))
    mixed_dim = gl.arange(0, L, layout=gl.SliceLayout(0, mixed_layout))
    entry_w = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, wide))
    entry_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, narrow))
    entry_s = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, score_layout))

    while block < end:
        row_begin = gl.load(block_start_ptr + row)
        row_end = gl.load(block_start_ptr + row + 1)
        until = gl.minimum(end, row_end)
        length = gl.load(length_ptr + row)
        if IS_SPARSE:
            token = first_token + row
            num_tokens = length * 0 + 1
            table_row = gl.load(table_row_ptr + row)
        else:
            token = gl.load(query_start_ptr + row)
            num_tokens = gl.load(query_start_ptr + row + 1) - token
            table_row = row
        if (until > block) & (tile * BLOCK_M < num_tokens * H):
            row_table_ptr = table_ptr + table_row.to(gl.int64) * table_stride
            row_selected_ptr = selected_ptr + token.to(gl.int64) * selected_stride
            first_entry = (block - row_begin) * BLOCK_N
            slot_w = _slots(row_table_ptr, row_selected_ptr, first_entry + entry_w, length, BLOCK_SIZE, IS_SPARSE)
            slot_n = _slots(row_table_ptr, row_selected_ptr, first_entry + entry_n, length, BLOCK_SIZE, IS_SPARSE)
            place_w = _places(slot_w, page_eighths, entry_eighths, BLOCK_SIZE)
            place_n = _places(slot_n, page_eighths, entry_eighths, BLOCK_SIZE)
            async_copy.async_copy_global_to_shared(
                latent_smem.index(0),
                cache_ptr + place_w[:, None] + latent_dim[None, :],
                mask=(first_entry + entry_w < length)[:, None],
            )
            async_copy.async_copy_global_to_shared(
                rope_smem.index(0),
                cache_ptr + L + place_n[:, None] + rope_dim[None, :],
                mask=(first_entry + entry_n < length)[:, None],
            )
            async_copy.commit_group()
            at_token = (token + query_w // H).to(gl.int64)
            q_latent = gl.load(
                query_ptr
                + ((query_w % H).to(gl.int64) * query_head_stride + (at_token - first_token) * query_token_stride)[
                    :, None
                ]
                + latent_dim[None, :],
                mask=(query_w < num_tokens * H)[:, None],
                other=0.0,
            )
            q_latent_smem.store(q_latent)
            at_token = (token + query_n // H).to(gl.int64)
            q_rope = gl.load(
                rope_ptr
                + (at_token * rope_token_stride + (query_n % H) * rope_head_stride)[:, None]
                + rope_dim[None, :],
                mask=(query_n < num_tokens * H)[:, None],
                other=0.0,
            )
            q_rope_smem.store(q_rope)
            fence_async_shared()
            first_entry += BLOCK_N
            slot_w = _slots(row_table_ptr, row_selected_ptr, first_entry + entry_w, length, BLOCK_SIZE, IS_SPARSE)
            slot_n = _slots(row_table_ptr, row_selected_ptr, first_entry + entry_n, length, BLOCK_SIZE, IS_SPARSE)

            if IS_SPARSE:
                seen = query_s * 0 + length
            else:
                seen = length - num_tokens + 1 + query_s // H
            highest = gl.full([BLOCK_M], -1.0e30, gl.float32, layout=gl.SliceLayout(1, score_layout))
            total_weight = gl.zeros([BLOCK_M], gl.float32, layout=gl.SliceLayout(1, score_layout))
            mixed = gl.zeros([BLOCK_M, L], gl.float32, layout=mixed_layout)
            no_scores = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=score_layout)
            stage = 0
            for _ in range(block, until):
                # Behind this, the block is there, and every warp has done with the one before it.
                async_copy.wait_group(0)
                fence_async_shared()
                latent = latent_smem.index(stage)
                scores = warpgroup_mma(q_latent_smem, latent.permute((1, 0)), no_scores, use_acc=False, is_async=True)
                scores = warpgroup_mma(q_rope_smem, rope_smem.index(stage).permute((1, 0)), scores, is_async=True)
                # Loads are issued while the first products are computed.
                place_w = _places(slot_w, page_eighths, entry_eighths, BLOCK_SIZE)
                place_n = _places(slot_n, page_eighths, entry_eighths, BLOCK_SIZE)
                async_copy.async_copy_global_to_shared(
                    latent_smem.index(1 - stage),
                    cache_ptr + place_w[:, None] + latent_dim[None, :],
                    mask=(first_entry + entry_w < length)[:, None],
                )
                async_copy.async_copy_global_to_shared(
                    rope_smem.index(1 - stage),
                    cache_ptr + L + place_n[:, None] + rope_dim[None, :],
                    mask=(first_entry + entry_n < length)[:, None],
                )
                async_copy.commit_group()
                position = first_entry + entry_s - BLOCK_N
                first_entry += BLOCK_N
                slot_w = _slots(row_table_ptr, row_selected_ptr, first_entry + entry_w, length, BLOCK_SIZE, IS_SPARSE)
                slot_n = _slots(row_table_ptr, row_selected_ptr, first_entry + entry_n, length, BLOCK_SIZE, IS_SPARSE)
                scores = warpgroup_mma_wait(0, deps=[scores])
                scores = gl.where(position[None, :] < seen[:, None], scores * scale, float("-inf"))
                new_highest = gl.maximum(highest, gl.max(scores, axis=1))
                kept = gl.exp2(highest - new_highest)
                weight = gl.exp2(scores - new_highest[:, None])
                total_weight = total_weight * kept + gl.sum(weight, axis=1)
                highest = new_highest
                mixed = mixed * gl.convert_layout(kept, gl.SliceLayout(1, mixed_layout))[:, None]
                mixed = warpgroup_mma(gl.convert_layout(weight.to(dtype), weight_layout), latent, mixed, is_async=True)
                mixed = warpgroup_mma_wait(0, deps=[mixed])
                stage = 1 - stage
            async_copy.wait_group(0)
            factor = value_scale / gl.where(total_weight > 0, total_weight, 1.0)
            mixed = mixed * gl.convert_layout(factor, gl.SliceLayout(1, mixed_layout))[:, None]
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
                gl.store(piece_ptr + at_piece[:, None] * L + mixed_dim[None, :], mixed)
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


@gluon.jit
def _places(slot, page_eighths, entry_eighths, BLOCK_SIZE: gl.constexpr):
    """Where the entries begin; eighths tell the compiler that these are multiples of eight."""
    return (slot // BLOCK_SIZE).to(gl.int64) * (page_eighths * 8) + (slot % BLOCK_SIZE) * (entry_eighths * 8)
