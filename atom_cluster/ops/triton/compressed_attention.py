"""Attention over a window of tokens and compressed entries: a program has some heads of a token. Knows no layers.

The blocks of a token's window come first, then those of its entries; several programs share them where there are few
tokens, and their pieces are joined. Shape suffixes: T tokens, H heads, D head dim, G pieces, K entries selected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.compressed_attention import CompressedAttentionPlan
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.mla_schedule import see_entries
from atom_cluster.ops.triton.paged_store import store_entries
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying

LOG2_E = 1.4426950408889634

MAX_PARTS = 8
"""Programs that share a token's keys at most."""


class PagedCompressedAttention:
    """Attention of one step."""

    def __init__(self, tokens: AttentionMetadata, entries: AttentionMetadata, tokens_per_entry: int) -> None:
        if tokens.window is None:
            raise AssertionError("attention to entries has a window for tokens")
        self._tokens, self._entries = tokens, entries
        self._window, self._tokens_per_entry = tokens.window, tokens_per_entry
        self._seen_T, self._row_T = see_entries(tokens)

    def store(self, key_TD: torch.Tensor, tokens: KvLayerCache) -> None:
        """Write the step's keys to their slots."""
        store_entries(key_TD, tokens, self._tokens.slot, block_size=self._tokens.block_size)

    def attend(
        self,
        query_THD: torch.Tensor,
        tokens: KvLayerCache,
        entries: KvLayerCache,
        *,
        scale: float,
        sink_H: torch.Tensor,
        selected_TK: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the step's queries over their rows' tokens and entries."""
        num_tokens, num_heads, dim = query_THD.shape
        out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
        if not num_tokens:
            return out_THD
        block_m, block_n, warps, stages = _tile_sizes(num_heads, query_THD.dtype)
        num_tiles = triton.cdiv(num_heads, block_m)
        num_programs = runtime.num_multiprocessors(query_THD.device)
        num_parts = max(1, min(MAX_PARTS, num_programs // (num_tokens * num_tiles)))
        num_pieces = num_parts if num_parts > 1 else 0
        piece_GTHD = torch.empty(num_pieces, *query_THD.shape, dtype=torch.float32, device=query_THD.device)
        weight_GTH = torch.empty(num_pieces, num_tokens, num_heads, dtype=torch.float32, device=query_THD.device)
        dim_block = max(16, triton.next_power_of_2(dim))
        _attend_kernel[(num_tiles, num_tokens, num_parts)](
            query_THD,
            tokens.key,
            entries.key,
            self._tokens.block_table,
            self._entries.block_table,
            self._row_T,
            self._seen_T,
            out_THD if selected_TK is None else selected_TK,
            sink_H,
            out_THD,
            piece_GTHD,
            weight_GTH,
            scale * LOG2_E,
            float(tokens.key_scale),
            float(entries.key_scale),
            num_tokens,
            *query_THD.stride()[:2],
            *tokens.key.stride()[:2],
            *entries.key.stride()[:2],
            self._tokens.block_table.stride(0),
            self._entries.block_table.stride(0),
            H=num_heads,
            D=dim,
            D_BLOCK=dim_block,
            K=0 if selected_TK is None else selected_TK.shape[1],
            WINDOW=self._window,
            SIZE=self._tokens_per_entry,
            TOKEN_BLOCK_SIZE=self._tokens.block_size,
            ENTRY_BLOCK_SIZE=self._entries.block_size,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            IS_SPLIT=num_parts > 1,
            num_warps=warps,
            num_stages=stages,
            **({"matrix_instr_nonkdim": 16} if runtime.is_hip() else {}),
            **launch_options(),
        )
        if num_parts > 1:
            _join_kernel[(num_tokens * num_heads,)](
                sink_H,
                out_THD,
                piece_GTHD,
                weight_GTH,
                num_tokens * num_heads,
                H=num_heads,
                D=dim,
                D_BLOCK=dim_block,
                NUM_PARTS=num_parts,
                PART_BLOCK=triton.next_power_of_2(num_parts),
                num_warps=4,
                **launch_options(),
            )
        return out_THD


def plan_compressed_attention(
    tokens: AttentionMetadata, entries: AttentionMetadata, *, tokens_per_entry: int
) -> CompressedAttentionPlan:
    """The plan of one step."""
    return PagedCompressedAttention(tokens, entries, tokens_per_entry)


def _tile_sizes(num_heads: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Heads and keys of a tile, warps, stages."""
    heads = max(16, triton.next_power_of_2(num_heads))
    if dtype == torch.float32:
        return 16, 16, 4, 1
    if runtime.is_hip():
        return min(32, heads), 32, 4, 1
    return 64, 64, 8, 2


@triton.jit(**varying("row_ptr", "seen_ptr", "num_tokens", "token_table_stride", "entry_table_stride"))
def _attend_kernel(
    query_ptr,
    token_cache_ptr,
    entry_cache_ptr,
    token_table_ptr,
    entry_table_ptr,
    row_ptr,
    seen_ptr,
    selected_ptr,
    sink_ptr,
    out_ptr,
    piece_ptr,
    weight_ptr,
    scale,
    token_scale,
    entry_scale,
    num_tokens,
    query_token_stride,
    query_head_stride,
    token_page_stride,
    token_stride,
    entry_page_stride,
    entry_stride,
    token_table_stride,
    entry_table_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    K: tl.constexpr,
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    TOKEN_BLOCK_SIZE: tl.constexpr,
    ENTRY_BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: some heads of a token, every so many blocks of its keys."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    token = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    row = tl.load(row_ptr + token).to(tl.int64)
    seen = tl.load(seen_ptr + token)
    head = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, D_BLOCK)
    is_inside = (head < H)[:, None] & (dim < D)[None, :]
    query = tl.load(
        query_ptr + token * query_token_stride + (head * query_head_stride)[:, None] + dim[None, :],
        is_inside,
        other=0.0,
    )
    token_table_ptr += row * token_table_stride
    entry_table_ptr += row * entry_table_stride
    first_position = tl.maximum(seen - WINDOW, 0)
    num_window_blocks = tl.cdiv(seen - first_position, BLOCK_N)
    num_entries = seen // SIZE
    if K > 0:
        num_entries = tl.minimum(num_entries, K)
    num_blocks = num_window_blocks + tl.cdiv(num_entries, BLOCK_N)
    highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, D_BLOCK], tl.float32)
    for block in range(part, num_blocks, tl.num_programs(2)):
        if block < num_window_blocks:
            position = first_position + block * BLOCK_N + tl.arange(0, BLOCK_N)
            is_key = position < seen
            page = tl.load(token_table_ptr + position // TOKEN_BLOCK_SIZE, is_key, other=0).to(tl.int64)
            place = page * token_page_stride + (position % TOKEN_BLOCK_SIZE) * token_stride
            key_scale = token_scale
            keys = tl.load(
                token_cache_ptr + place[:, None] + dim[None, :], is_key[:, None] & (dim < D)[None, :], other=0.0
            ).to(dtype)
        else:
            at = (block - num_window_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
            is_key = at < num_entries
            entry = at
            if K > 0:
                entry = tl.load(selected_ptr + token * K + at, is_key, other=0)
            last = entry * SIZE + SIZE - 1
            page = tl.load(entry_table_ptr + last // ENTRY_BLOCK_SIZE, is_key, other=0).to(tl.int64)
            place = page * entry_page_stride + (last % ENTRY_BLOCK_SIZE // SIZE) * entry_stride
            key_scale = entry_scale
            keys = tl.load(
                entry_cache_ptr + place[:, None] + dim[None, :], is_key[:, None] & (dim < D)[None, :], other=0.0
            ).to(dtype)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * (scale * key_scale)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        kept = tl.exp2(highest - new_highest)
        weight = tl.exp2(scores - new_highest[:, None])
        total = total * kept + tl.sum(weight, axis=1)
        mixed = tl.dot((weight * key_scale).to(dtype), keys, mixed * kept[:, None], input_precision="ieee")
        highest = new_highest
    if IS_SPLIT:
        at_piece = (part.to(tl.int64) * num_tokens + token) * H + head
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(piece_ptr + at_piece[:, None] * D + dim[None, :], mixed, is_inside)
        tl.store(weight_ptr + at_piece, tl.where(total > 0, highest + tl.log2(total), -1.0e30), head < H)
    else:
        sink = tl.load(sink_ptr + head, head < H, other=0.0).to(tl.float32) * 1.4426950408889634
        new_highest = tl.maximum(highest, sink)
        kept = tl.exp2(highest - new_highest)
        total = total * kept + tl.exp2(sink - new_highest)
        mixed = mixed * (kept / total)[:, None]
        tl.store(out_ptr + (token * H + head)[:, None] * D + dim[None, :], mixed.to(dtype), is_inside)


@triton.jit(**varying("part_stride"))
def _join_kernel(
    sink_ptr,
    out_ptr,
    piece_ptr,
    weight_ptr,
    part_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PART_BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: a head of a token. The sink has no value, only weight."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    at = tl.program_id(0)
    sink = tl.load(sink_ptr + at % H).to(tl.float32) * 1.4426950408889634
    part = tl.arange(0, PART_BLOCK)
    dim = tl.arange(0, D_BLOCK)
    at_piece = part.to(tl.int64) * part_stride + at
    logarithm = tl.load(weight_ptr + at_piece, part < NUM_PARTS, other=-1.0e30)
    highest = tl.maximum(tl.max(logarithm, axis=0), sink)
    weight = tl.exp2(logarithm - highest)
    piece = tl.load(
        piece_ptr + at_piece[:, None] * D + dim[None, :], (part < NUM_PARTS)[:, None] & (dim < D)[None, :], other=0.0
    )
    mixed = tl.sum(piece * weight[:, None], axis=0) / (tl.sum(weight, axis=0) + tl.exp2(sink - highest))
    tl.store(out_ptr + at.to(tl.int64) * D + dim, mixed.to(out_ptr.dtype.element_ty), dim < D)
