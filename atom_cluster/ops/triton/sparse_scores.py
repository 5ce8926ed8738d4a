"""Scores of a sparse index: products of index heads with paged keys, as one kernel. Knows no selection.

Shape suffixes: T tokens, J index heads, D dims of an index head, C entries of the longest row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import KvLayerCache
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying

PROGRAMS_PER_MULTIPROCESSOR = 4


def index_scores(
    query_TJD: torch.Tensor,
    weight_TJ: torch.Tensor,
    kv: KvLayerCache,
    block_table: torch.Tensor,
    row_T: torch.Tensor,
    seen_T: torch.Tensor,
    out_TC: torch.Tensor,
    *,
    block_size: int,
    tokens_per_entry: int,
    num_skipped: int,
) -> None:
    """Fill in the first `seen_T` scores of each token that sees more than `num_skipped` entries.

    row_T, seen_T: [T] int32: each token's line of the block table, and how many entries it sees; rows are in order.
    """
    num_tokens, num_heads, dim = query_TJD.shape
    heads = triton.next_power_of_2(num_heads)
    dim_block = max(16, triton.next_power_of_2(dim))
    if query_TJD.dtype == torch.float32:
        tokens, entries, warps = max(1, 16 // heads), 32, 4
    elif runtime.is_hip():
        tokens, entries, warps = max(1, 64 // heads), 64, 4
    else:
        # Tokens that come one at a time from each row would share nothing.
        tokens, entries, warps = max(1, (128 if num_tokens > 512 else 64) // heads), 128, 8
    num_tiles = triton.cdiv(num_tokens, tokens)
    num_programs = PROGRAMS_PER_MULTIPROCESSOR * runtime.num_multiprocessors(query_TJD.device)
    num_parts = max(1, min(triton.cdiv(out_TC.shape[1], entries), num_programs // num_tiles))
    _scores_kernel[(num_tiles, num_parts)](
        query_TJD,
        weight_TJ,
        kv.key,
        block_table,
        row_T,
        seen_T,
        out_TC,
        float(kv.key_scale),
        num_tokens,
        num_skipped,
        *query_TJD.stride()[:2],
        weight_TJ.stride(0),
        *kv.key.stride()[:2],
        block_table.stride(0),
        out_TC.stride(0),
        J=num_heads,
        D=dim,
        HEADS=heads,
        D_BLOCK=dim_block,
        BLOCK_SIZE=block_size,
        TOKENS_PER_ENTRY=tokens_per_entry,
        TOKENS=tokens,
        ENTRIES=entries,
        num_warps=warps,
        num_stages=1 if query_TJD.dtype == torch.float32 or runtime.is_hip() else 3,
        **launch_options(),
    )


@triton.jit(**varying("row_ptr", "seen_ptr", "num_tokens", "num_skipped", "table_stride", "out_stride"))
def _scores_kernel(
    query_ptr,
    weight_ptr,
    cache_ptr,
    table_ptr,
    row_ptr,
    seen_ptr,
    out_ptr,
    key_scale,
    num_tokens,
    num_skipped,
    query_token_stride,
    query_head_stride,
    weight_stride,
    page_stride,
    entry_stride,
    table_stride,
    out_stride,
    J: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS_PER_ENTRY: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: some tokens, every so many blocks of the entries of their rows."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    part = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    seen = tl.load(seen_ptr + token, is_token, other=0)
    seen = tl.where(seen > num_skipped, seen, 0)
    rows = tl.load(row_ptr + token, is_token, other=-1)
    if tl.max(seen, axis=0) > part * ENTRIES:
        dtype: tl.constexpr = query_ptr.dtype.element_ty
        column = tl.arange(0, TOKENS * HEADS)
        head = column % HEADS
        at_token = (tl.program_id(0) * TOKENS + column // HEADS).to(tl.int64)
        is_query = (head < J) & (at_token < num_tokens)
        dim = tl.arange(0, D_BLOCK)
        query = tl.load(
            query_ptr + (at_token * query_token_stride + head * query_head_stride)[:, None] + dim[None, :],
            is_query[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        weight = tl.load(weight_ptr + at_token * weight_stride + head, is_query, other=0.0).to(tl.float32)
        row = tl.load(row_ptr + tl.program_id(0) * TOKENS)
        while row <= tl.max(rows, axis=0):
            row_seen = tl.where(rows == row, seen, 0)
            row_table_ptr = table_ptr + row.to(tl.int64) * table_stride
            most = tl.max(row_seen, axis=0)
            for block in range(part, tl.cdiv(most, ENTRIES), tl.num_programs(1)):
                entry = block * ENTRIES + tl.arange(0, ENTRIES)
                is_entry = entry < most
                last_token = entry * TOKENS_PER_ENTRY + TOKENS_PER_ENTRY - 1
                page = tl.load(row_table_ptr + last_token // BLOCK_SIZE, is_entry, other=0).to(tl.int64)
                place = page * page_stride + (last_token % BLOCK_SIZE // TOKENS_PER_ENTRY) * entry_stride
                key = tl.load(
                    cache_ptr + place[:, None] + dim[None, :], is_entry[:, None] & (dim < D)[None, :], other=0.0
                ).to(dtype)
                products = tl.dot(key, tl.trans(query), input_precision="ieee") * key_scale
                products = tl.maximum(products, 0.0) * weight[None, :]
                scores = tl.sum(tl.reshape(products, [ENTRIES, TOKENS, HEADS]), axis=2)
                tl.store(
                    out_ptr + (token.to(tl.int64) * out_stride)[None, :] + entry[:, None],
                    scores,
                    entry[:, None] < row_seen[None, :],
                )
            row += 1
