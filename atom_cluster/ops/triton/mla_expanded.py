"""Attention to keys and values that were expanded from latents: two kernels, one that gathers the latents, one attends.

Gathered latents of a row begin at a multiple of a tile and are zero behind its end, so that no tile has another row's
numbers. Knows no weights and no layers.

Shape suffixes: T tokens of the step, C gathered places, H heads, L latent dims, S stored dims, N dims without and P
dims with position, V value dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.triton import mla_expanded_hopper, runtime
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying

LOG2_E = 1.4426950408889634
PLACE_ALIGNMENT = 128
"""Of a row's first place, and what tiles of keys divide."""


@dataclass(frozen=True, slots=True)
class ExpandedRows:
    """Consecutive rows whose keys and values are expanded, and where they are gathered to."""

    query_start: torch.Tensor
    context_len: torch.Tensor
    block_table: torch.Tensor
    place_start: torch.Tensor
    """[rows + 1] int32"""
    num_places: int
    max_queries: int
    max_context: int
    """As the host knows them, which may be more than they have."""


def plan_expanded_rows(metadata: AttentionMetadata, rows: slice) -> ExpandedRows:
    """Of some rows."""
    starts, lengths = metadata.query_start_cpu, metadata.context_len_cpu[rows]
    places = [0]
    for length in lengths:
        places.append(places[-1] + triton.cdiv(length, PLACE_ALIGNMENT) * PLACE_ALIGNMENT)
    place_start = torch.tensor(places, dtype=torch.int32)
    device = metadata.context_len.device
    if device.type != "cpu":
        place_start = place_start.pin_memory().to(device, non_blocking=True)
    return ExpandedRows(
        query_start=metadata.query_start[rows.start : rows.stop + 1],
        context_len=metadata.context_len[rows],
        block_table=metadata.block_table[rows],
        place_start=place_start,
        num_places=places[-1],
        max_queries=max(starts[row + 1] - starts[row] for row in range(rows.start, rows.stop)),
        max_context=max(lengths),
    )


def gather(rows: ExpandedRows, kv: KvLayerCache, dtype: torch.dtype, *, block_size: int) -> torch.Tensor:
    """What is stored of the rows, [C, S] in `dtype`."""
    stored_dim = kv.key.shape[-1]
    out_CS = torch.empty(rows.num_places, stored_dim, dtype=dtype, device=kv.key.device)
    tokens = 16
    most = triton.cdiv(rows.max_context, PLACE_ALIGNMENT) * PLACE_ALIGNMENT
    _gather_kernel[(triton.cdiv(most, tokens), len(rows.context_len))](
        kv.key,
        out_CS,
        rows.context_len,
        rows.place_start,
        rows.block_table,
        float(kv.key_scale),
        *kv.key.stride()[:2],
        rows.block_table.stride(0),
        BLOCK_SIZE=block_size,
        D=stored_dim,
        D_BLOCK=triton.next_power_of_2(stored_dim),
        TOKENS=tokens,
        num_warps=4,
        **launch_options(),
    )
    return out_CS


def attend_expanded(
    query_THN: torch.Tensor,
    rope_THP: torch.Tensor,
    key_CHN: torch.Tensor,
    rope_CP: torch.Tensor,
    value_CHV: torch.Tensor,
    rows: ExpandedRows,
    *,
    scale: float,
    out_THV: torch.Tensor,
) -> None:
    """Fill in the rows' part of `out_THV`. Queries and output are of all tokens of the step."""
    if mla_expanded_hopper.is_fit(query_THN, rope_THP, key_CHN, rope_CP, value_CHV, out_THV):
        mla_expanded_hopper.attend(
            query_THN,
            rope_THP,
            key_CHN,
            rope_CP,
            value_CHV,
            rows.query_start,
            rows.context_len,
            rows.place_start,
            max_queries=rows.max_queries,
            scale_log2=scale * LOG2_E,
            out_THV=out_THV,
        )
        return
    num_heads, nope_dim = key_CHN.shape[1:]
    rope_dim, value_dim = rope_CP.shape[-1], value_CHV.shape[-1]
    blocks = [max(16, triton.next_power_of_2(dim)) for dim in (nope_dim, rope_dim, value_dim)]
    queries, keys, warps, stages = _tile_sizes(query_THN.dtype, sum(blocks), blocks[2])
    options = {"matrix_instr_nonkdim": 16, "waves_per_eu": 2} if runtime.is_hip() else launch_options()
    _attend_kernel[(triton.cdiv(rows.max_queries, queries), num_heads, len(rows.context_len))](
        query_THN,
        rope_THP,
        key_CHN,
        rope_CP,
        value_CHV,
        out_THV,
        rows.query_start,
        rows.context_len,
        rows.place_start,
        scale * LOG2_E,
        *query_THN.stride()[:2],
        *rope_THP.stride()[:2],
        *key_CHN.stride()[:2],
        rope_CP.stride(0),
        *value_CHV.stride()[:2],
        *out_THV.stride()[:2],
        N=nope_dim,
        P=rope_dim,
        V=value_dim,
        N_BLOCK=blocks[0],
        P_BLOCK=blocks[1],
        V_BLOCK=blocks[2],
        BLOCK_M=queries,
        BLOCK_N=keys,
        STAGES=stages,
        num_warps=warps,
        num_stages=stages,
        **({"OVERLAPS": False} | options),
    )


def _tile_sizes(dtype: torch.dtype, stored_dims: int, value_dims: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, stages. stored_dims: of a key and a value, which are in shared memory."""
    if dtype == torch.float32:
        return 16, 32, 4, 1
    if runtime.is_hip():
        return 128, 32, 4 if stored_dims <= 320 else 8, 1
    if stored_dims > 320:
        return 128, 32, 8, 2
    return 128, 128 if value_dims <= 128 else 64, 8, 2


@triton.jit(**varying("context_len_ptr", "place_start_ptr", "table_stride"))
def _gather_kernel(
    cache_ptr,
    out_ptr,
    context_len_ptr,
    place_start_ptr,
    table_ptr,
    scale,
    page_stride,
    entry_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: some positions of a row."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    row = tl.program_id(1)
    place = tl.load(place_start_ptr + row)
    num_places = tl.load(place_start_ptr + row + 1) - place
    first = tl.program_id(0) * TOKENS
    if first < num_places:
        position = first + tl.arange(0, TOKENS)
        dim = tl.arange(0, D_BLOCK)[None, :]
        is_cached = position < tl.load(context_len_ptr + row)
        page = tl.load(table_ptr + row.to(tl.int64) * table_stride + position // BLOCK_SIZE, is_cached, other=0)
        source = page.to(tl.int64) * page_stride + (position % BLOCK_SIZE) * entry_stride
        x = tl.load(cache_ptr + source[:, None] + dim, is_cached[:, None] & (dim < D), other=0.0).to(tl.float32)
        target = (place + position).to(tl.int64) * D
        tl.store(out_ptr + target[:, None] + dim, (x * scale).to(out_ptr.dtype.element_ty), dim < D)


@triton.jit(**varying("query_start_ptr", "context_len_ptr", "place_start_ptr"))
def _attend_kernel(
    query_ptr,
    query_rope_ptr,
    key_ptr,
    key_rope_ptr,
    value_ptr,
    out_ptr,
    query_start_ptr,
    context_len_ptr,
    place_start_ptr,
    scale,
    query_token_stride,
    query_head_stride,
    query_rope_token_stride,
    query_rope_head_stride,
    key_place_stride,
    key_head_stride,
    key_rope_place_stride,
    value_place_stride,
    value_head_stride,
    out_token_stride,
    out_head_stride,
    N: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    N_BLOCK: tl.constexpr,
    P_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: some queries of a row, one head. Those that see most come first."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    row = tl.program_id(2)
    head = tl.program_id(1).to(tl.int64)
    token = tl.load(query_start_ptr + row)
    num_queries = tl.load(query_start_ptr + row + 1) - token
    num_cached = tl.load(context_len_ptr + row) - num_queries
    place = tl.load(place_start_ptr + row).to(tl.int64)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first < num_queries:
        dtype: tl.constexpr = query_ptr.dtype.element_ty
        query = first + tl.arange(0, BLOCK_M)
        is_query = (query < num_queries)[:, None]
        at_token = (token + query).to(tl.int64)
        nope_dim = tl.arange(0, N_BLOCK)[None, :]
        rope_dim = tl.arange(0, P_BLOCK)[None, :]
        value_dim = tl.arange(0, V_BLOCK)[None, :]
        q_nope = tl.load(
            query_ptr + (at_token * query_token_stride)[:, None] + head * query_head_stride + nope_dim,
            is_query & (nope_dim < N),
            other=0.0,
        )
        q_rope = tl.load(
            query_rope_ptr + (at_token * query_rope_token_stride)[:, None] + head * query_rope_head_stride + rope_dim,
            is_query & (rope_dim < P),
            other=0.0,
        )
        entry = tl.arange(0, BLOCK_N)
        key_ptr += place * key_place_stride + head * key_head_stride
        key_rope_ptr += place * key_rope_place_stride
        value_ptr += place * value_place_stride + head * value_head_stride
        key_offsets = (entry * key_place_stride)[:, None] + nope_dim
        rope_offsets = (entry * key_rope_place_stride)[:, None] + rope_dim
        value_offsets = (entry * value_place_stride)[:, None] + value_dim
        highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, V_BLOCK], tl.float32)
        last = num_cached + tl.minimum(first + BLOCK_M, num_queries)
        num_whole = (num_cached + first + 1) // BLOCK_N
        for is_masked in tl.static_range(2):
            first_block = num_whole if is_masked else 0
            end_block = tl.cdiv(last, BLOCK_N) if is_masked else num_whole
            for block in tl.range(first_block, end_block, num_stages=STAGES):
                key = tl.load(key_ptr + key_offsets, nope_dim < N, other=0.0)
                rope = tl.load(key_rope_ptr + rope_offsets, rope_dim < P, other=0.0)
                scores = tl.dot(q_nope, tl.trans(key), input_precision="ieee")
                scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision="ieee")
                if is_masked:
                    is_visible = (block * BLOCK_N + entry)[None, :] <= (num_cached + query)[:, None]
                    scores = tl.where(is_visible, scores, -1.0e30)
                new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale)
                weight = tl.exp2(scores * scale - new_highest[:, None])
                kept = tl.exp2(highest - new_highest)
                total = total * kept + tl.sum(weight, axis=1)
                value = tl.load(value_ptr + value_offsets, value_dim < V, other=0.0)
                mixed = tl.dot(weight.to(dtype), value, mixed * kept[:, None], input_precision="ieee")
                highest = new_highest
                key_ptr += BLOCK_N * key_place_stride
                key_rope_ptr += BLOCK_N * key_rope_place_stride
                value_ptr += BLOCK_N * value_place_stride
        tl.store(
            out_ptr + (at_token * out_token_stride)[:, None] + head * out_head_stride + value_dim,
            (mixed / total[:, None]).to(dtype),
            is_query & (value_dim < V),
        )
