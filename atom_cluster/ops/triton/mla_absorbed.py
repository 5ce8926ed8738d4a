"""Attention to the cached latents themselves, for absorbed queries: the kernel, and the one that joins its pieces.

The latents of all rows, in blocks, are one long list of work that is cut into equal parts, one for each program of a
tile of queries, wherever rows begin; `mla_schedule` counts the blocks on the device. A row that lies within one part is
finished by it. Of others, each part leaves a piece, and the pieces of a row are joined. Knows no weights and no layers.

Shape suffixes: T tokens of the rows, H heads, L latent dims, P positional dims, G pieces, M queries (token, head) of a
row, K positions selected per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import KvLayerCache
from atom_cluster.ops.triton import mla_hopper, runtime
from atom_cluster.ops.triton.mla_schedule import Blocks
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of tiles and how they are launched."""

    queries: int
    keys: int
    warps: int
    stages: int
    is_hopper: bool = False
    """For the kernel in `mla_hopper`."""


def choose_tiles(num_queries: int, latent_dim: int, rope_dim: int, dtype: torch.dtype, kv: KvLayerCache) -> Tiles:
    """For rows of `num_queries` queries, heads times tokens, at most."""
    if dtype == torch.float32:
        return Tiles(16, 16 if latent_dim > 128 else 32, 4, 1)
    if runtime.is_hip():
        return Tiles(min(32, max(16, triton.next_power_of_2(num_queries))), 32, 4, 1)
    if mla_hopper.is_fit(dtype, latent_dim, rope_dim, kv):
        return Tiles(mla_hopper.NUM_QUERIES, mla_hopper.NUM_KEYS, mla_hopper.NUM_WARPS, 1, is_hopper=True)
    return Tiles(64, 64, 8, 2)


def attend_absorbed(
    query_HTL: torch.Tensor,
    rope_THP: torch.Tensor,
    kv: KvLayerCache,
    blocks: Blocks,
    tiles: Tiles,
    *,
    block_size: int,
    scale: float,
    first_token: int,
    selected_TK: torch.Tensor | None,
) -> torch.Tensor:
    """Mixtures of latents, [H, T, L]. rope_THP and selected_TK are of all tokens of the step.

    blocks: of the rows of this call, whose tokens are T from `first_token` on.
    """
    num_heads, num_tokens, latent_dim = query_HTL.shape
    rope_dim = rope_THP.shape[-1]
    num_tiles = triton.cdiv(blocks.max_tokens * num_heads, tiles.queries)
    num_parts = blocks.num_parts(num_tiles)
    out_HTL = torch.empty(num_heads, num_tokens, latent_dim, dtype=query_HTL.dtype, device=query_HTL.device)
    num_pieces = 2 * num_parts if num_parts > 1 else 1
    num_queries = num_tiles * tiles.queries
    piece_GML = torch.empty(num_pieces, num_queries, latent_dim, dtype=torch.float32, device=out_HTL.device)
    weight_GM = torch.empty(num_pieces, num_queries, dtype=torch.float32, device=out_HTL.device)
    shared = (
        blocks.query_start,
        blocks.block_start,
        out_HTL,
        piece_GML,
        weight_GM,
        blocks.num_rows,
        first_token,
        *out_HTL.stride()[:2],
    )
    call = (
        query_HTL,
        rope_THP,
        kv.key,
        blocks.block_table,
        blocks.table_row,
        blocks.length,
        out_HTL if selected_TK is None else selected_TK,
        *shared,
        scale * kv.key_scale * LOG2_E,
        float(kv.key_scale),
        *query_HTL.stride()[:2],
        *rope_THP.stride()[:2],
    )
    strides = blocks.block_table.stride(0), 0 if selected_TK is None else selected_TK.stride(0)
    sizes = {
        "H": num_heads,
        "L": latent_dim,
        "P": rope_dim,
        "BLOCK_SIZE": block_size,
        "IS_SPARSE": selected_TK is not None,
        "MIN_BLOCKS": blocks.min_per_part,
        "ROW_BLOCK": 256 if blocks.num_rows <= 256 else 1024,
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        "num_warps": tiles.warps,
    }
    if tiles.is_hopper:
        page_stride, entry_stride = kv.key.stride()[:2]
        mla_hopper.attend_kernel[(num_tiles, num_parts)](*call, page_stride // 8, entry_stride // 8, *strides, **sizes)
    else:
        _attend_kernel[(num_tiles, num_parts)](
            *call,
            *kv.key.stride()[:2],
            *strides,
            L_BLOCK=max(16, triton.next_power_of_2(latent_dim)),
            P_BLOCK=max(16, triton.next_power_of_2(rope_dim)),
            STAGES=tiles.stages,
            num_stages=tiles.stages,
            **sizes,
            **({"matrix_instr_nonkdim": 16} if runtime.is_hip() else {}),
            **launch_options(),
        )
    if num_parts > 1:
        is_small = blocks.num_rows * blocks.max_tokens * num_heads <= 1024
        queries, pieces, dims = (1, 16, min(128, latent_dim)) if is_small else (4, 2, latent_dim)
        dim_block = triton.next_power_of_2(dims)
        grid = (
            blocks.num_rows,
            triton.cdiv(blocks.max_tokens * num_heads, queries),
            triton.cdiv(latent_dim, dim_block),
        )
        _join_kernel[grid](
            *shared,
            num_parts,
            num_queries,
            H=num_heads,
            L=latent_dim,
            IS_SPARSE=selected_TK is not None,
            MIN_BLOCKS=blocks.min_per_part,
            QUERIES=queries,
            DIM_BLOCK=dim_block,
            PIECES=pieces,
            num_warps=4,
            **launch_options(),
        )
    return out_HTL


@triton.jit(
    **varying(
        "table_row_ptr", "length_ptr", "query_start_ptr", "block_start_ptr", "num_rows", "first_token", "table_stride"
    )
)
def _attend_kernel(
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
    page_stride,
    entry_stride,
    table_stride,
    selected_stride,
    H: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    L_BLOCK: tl.constexpr,
    P_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: a tile of queries of every row that its part of the blocks touches."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    total = tl.load(block_start_ptr + num_rows)
    num_parts = _used_parts(total, tl.num_programs(1), MIN_BLOCKS)
    block = (part.to(tl.int64) * total // num_parts).to(tl.int32)
    end = ((part + 1).to(tl.int64) * total // num_parts).to(tl.int32)
    if part >= num_parts:
        end = block

    # The last row that begins at or before the part's first block; rows without blocks are before it.
    row = -1
    for first in range(0, num_rows, ROW_BLOCK):
        at = first + tl.arange(0, ROW_BLOCK)
        row += tl.sum((tl.load(block_start_ptr + at, at < num_rows, other=total + 1) <= block).to(tl.int32), axis=0)

    dtype: tl.constexpr = query_ptr.dtype.element_ty
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token_of_row = query // H
    head = query % H
    latent_dim = tl.arange(0, L_BLOCK)
    rope_dim = tl.arange(0, P_BLOCK)
    is_latent = latent_dim < L
    is_rope = rope_dim < P
    entry = tl.arange(0, BLOCK_N)
    while block < end:
        row_begin = tl.load(block_start_ptr + row)
        row_end = tl.load(block_start_ptr + row + 1)
        until = tl.minimum(end, row_end)
        length = tl.load(length_ptr + row)
        if IS_SPARSE:
            token = first_token + row
            num_tokens = 1
            seen = tl.zeros([BLOCK_M], tl.int32) + length
            table_row = tl.load(table_row_ptr + row)
        else:
            token = tl.load(query_start_ptr + row)
            num_tokens = tl.load(query_start_ptr + row + 1) - token
            seen = length - num_tokens + 1 + token_of_row
            table_row = row
        if (until > block) & (tile * BLOCK_M < num_tokens * H):
            is_query = (token_of_row < num_tokens)[:, None]
            at_token = (token + token_of_row).to(tl.int64)
            local_token = at_token - first_token
            q_latent = tl.load(
                query_ptr
                + (head.to(tl.int64) * query_head_stride + local_token * query_token_stride)[:, None]
                + latent_dim[None, :],
                is_query & is_latent[None, :],
                other=0.0,
            )
            q_rope = tl.load(
                rope_ptr + (at_token * rope_token_stride + head * rope_head_stride)[:, None] + rope_dim[None, :],
                is_query & is_rope[None, :],
                other=0.0,
            )
            row_table_ptr = table_ptr + table_row.to(tl.int64) * table_stride
            row_selected_ptr = selected_ptr + token.to(tl.int64) * selected_stride
            highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
            total_weight = tl.zeros([BLOCK_M], tl.float32)
            mixed = tl.zeros([BLOCK_M, L_BLOCK], tl.float32)
            # Slots are looked up one block ahead, so that latents are loaded as soon as there is room for them.
            slot = _slots(
                row_table_ptr, row_selected_ptr, (block - row_begin) * BLOCK_N + entry, length, BLOCK_SIZE, IS_SPARSE
            )
            for at_block in tl.range(block - row_begin, until - row_begin, num_stages=STAGES):
                position = at_block * BLOCK_N + entry
                is_entry = (position < length)[:, None]
                place = (slot // BLOCK_SIZE).to(tl.int64) * page_stride + (slot % BLOCK_SIZE) * entry_stride
                latent = tl.load(
                    cache_ptr + place[:, None] + latent_dim[None, :], is_entry & is_latent[None, :], other=0.0
                ).to(dtype)
                rope = tl.load(
                    cache_ptr + L + place[:, None] + rope_dim[None, :], is_entry & is_rope[None, :], other=0.0
                ).to(dtype)
                slot = _slots(row_table_ptr, row_selected_ptr, position + BLOCK_N, length, BLOCK_SIZE, IS_SPARSE)
                # For a product that others follow, the compiler gives every four warps all scores to compute. These
                # are not accumulated, and end at a branch, so that each has its share.
                scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee") * scale
                scores += tl.dot(q_rope, tl.trans(rope), input_precision="ieee") * scale
                if (at_block + 1) * BLOCK_N > length - num_tokens + 1:
                    scores = tl.where(position[None, :] < seen[:, None], scores, float("-inf"))
                new_highest = tl.maximum(highest, tl.max(scores, axis=1))
                kept = tl.exp2(highest - new_highest)
                weight = tl.exp2(scores - new_highest[:, None])
                total_weight = total_weight * kept + tl.sum(weight, axis=1)
                mixed = mixed * kept[:, None]
                mixed = tl.dot(weight.to(dtype), latent, mixed, input_precision="ieee")
                highest = new_highest
            mixed = mixed * (value_scale / tl.where(total_weight > 0, total_weight, 1.0))[:, None]
            if (block == row_begin) & (until == row_end):
                tl.store(
                    out_ptr
                    + (head.to(tl.int64) * out_head_stride + local_token * out_token_stride)[:, None]
                    + latent_dim[None, :],
                    mixed.to(dtype),
                    is_query & is_latent[None, :],
                )
            else:
                # A part has at most two: of a row that began before it, and of one that goes on behind it.
                piece = 2 * part + (block == row_begin).to(tl.int32)
                at_piece = piece.to(tl.int64) * (tl.num_programs(0) * BLOCK_M) + query
                tl.store(piece_ptr + at_piece[:, None] * L + latent_dim[None, :], mixed, is_latent[None, :])
                tl.store(weight_ptr + at_piece, tl.where(total_weight > 0, highest + tl.log2(total_weight), -1.0e30))
        block = until
        row += 1


@triton.jit(**varying("query_start_ptr", "block_start_ptr", "num_rows", "first_token", "max_parts", "num_queries"))
def _join_kernel(
    query_start_ptr,
    block_start_ptr,
    out_ptr,
    piece_ptr,
    weight_ptr,
    num_rows,
    first_token,
    out_head_stride,
    out_token_stride,
    max_parts,
    num_queries,
    H: tl.constexpr,
    L: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: some queries of a row, some dims. Nothing where the row is not in pieces."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    row = tl.program_id(0)
    total = tl.load(block_start_ptr + num_rows)
    begin = tl.load(block_start_ptr + row)
    end = tl.load(block_start_ptr + row + 1)
    num_parts = _used_parts(total, max_parts, MIN_BLOCKS)
    first_part = _part_of(begin, total, num_parts)
    last_part = _part_of(end - 1, total, num_parts)
    if IS_SPARSE:
        token = first_token + row
        num_tokens = 1
    else:
        token = tl.load(query_start_ptr + row)
        num_tokens = tl.load(query_start_ptr + row + 1) - token
    first_query = tl.program_id(1) * QUERIES
    if (last_part > first_part) & (end > begin) & (first_query < num_tokens * H):
        query = first_query + tl.arange(0, QUERIES)
        dim = tl.program_id(2) * DIM_BLOCK + tl.arange(0, DIM_BLOCK)
        is_inside = (query < num_tokens * H)[:, None] & (dim < L)[None, :]
        highest = tl.full([QUERIES], -1.0e30, tl.float32)
        total_weight = tl.zeros([QUERIES], tl.float32)
        mixed = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
        for first in range(first_part, last_part + 1, PIECES):
            part = first + tl.arange(0, PIECES)
            is_part = (part <= last_part)[None, :]
            piece = 2 * part + (part == first_part).to(tl.int32)
            at_piece = piece.to(tl.int64)[None, :] * num_queries + query[:, None]
            logarithm = tl.load(weight_ptr + at_piece, is_part, other=-1.0e30)
            pieces = tl.load(
                piece_ptr + at_piece[:, :, None] * L + dim[None, None, :],
                is_part[:, :, None] & is_inside[:, None, :],
                other=0.0,
            )
            new_highest = tl.maximum(highest, tl.max(logarithm, axis=1))
            kept = tl.exp2(highest - new_highest)
            weight = tl.where(logarithm > -1.0e30, tl.exp2(logarithm - new_highest[:, None]), 0.0)
            mixed = mixed * kept[:, None] + tl.sum(pieces * weight[:, :, None], axis=1)
            total_weight = total_weight * kept + tl.sum(weight, axis=1)
            highest = new_highest
        mixed = mixed / tl.where(total_weight > 0, total_weight, 1.0)[:, None]
        target = (token - first_token + query // H).to(tl.int64) * out_token_stride
        target += (query % H).to(tl.int64) * out_head_stride
        tl.store(out_ptr + target[:, None] + dim[None, :], mixed.to(out_ptr.dtype.element_ty), is_inside)


@triton.jit
def _used_parts(total, num_parts, MIN_BLOCKS: tl.constexpr):
    """Parts that blocks are shared out to: fewer where each would have too little to do."""
    return tl.minimum(num_parts, tl.maximum(total // MIN_BLOCKS, 1))


@triton.jit
def _part_of(block, total, num_parts):
    """The part whose blocks part * total // num_parts .. (part + 1) * total // num_parts - 1 have this one."""
    return (((block + 1).to(tl.int64) * num_parts - 1) // total).to(tl.int32)


@triton.jit
def _slots(table_ptr, selected_ptr, position, length, BLOCK_SIZE: tl.constexpr, IS_SPARSE: tl.constexpr):
    """Page times block size plus offset of the entries at these positions of a row, or of its selection."""
    is_entry = position < length
    if IS_SPARSE:
        position = tl.load(selected_ptr + position, is_entry, other=0)
    return tl.load(table_ptr + position // BLOCK_SIZE, is_entry, other=0) * BLOCK_SIZE + position % BLOCK_SIZE
