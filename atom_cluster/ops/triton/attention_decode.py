"""Attention of rows with few queries: keys are split over programs, whose parts the last one of a row combines.

Everything is sized by static shapes and finds its work on the device, so a captured launch serves any lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.attention_schedule import SplitSchedule, schedule_splits
from atom_cluster.ops.triton.attention_tile import (
    LOG2_E,
    LOWEST,
    attend_keys,
    entry_offsets,
    load_pages,
    load_queries,
    with_sink,
)
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying
from atom_cluster.platform.store_barrier import barrier_behind_stores

MAX_TILE = 64
"""Queries times heads of one program at most."""

MIN_VALUE_BLOCK = 32
"""Dims of values that are computed with at least. With 16, and 64 keys of eight bits, the assembler of CUDA 12.8 reads
descriptors of matrix units from registers that it never wrote."""

PART_ELEMENTS = 8192
"""Of splits that are combined at a time, which are read together."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the kernel is cut for some dims and dtypes."""

    keys: int
    """Per iteration."""
    min_keys: int
    """Of a split, a multiple of `keys`."""
    programs_per_multiprocessor: int
    """That splitting aims at."""
    num_warps: int
    num_stages: int


def decode_config(dim: int, value_dim: int, dtype: torch.dtype) -> DecodeConfig:
    """By the bytes of an entry, and by what a program may hold. Not by numbers of rows: each would be a kernel of its
    own, and steps would wait for it to be compiled."""
    widest = triton.next_power_of_2(max(dim, value_dim))
    if dtype == torch.float32 or widest > 256:
        return DecodeConfig(keys=32, min_keys=64, programs_per_multiprocessor=1, num_warps=4, num_stages=1)
    keys = 64 if widest <= 128 else 32
    # What fits into the shared memory of AMD chips; not measured there.
    num_stages = 1 if runtime.is_hip() or runtime.INTERPRETED else 3
    return DecodeConfig(keys, min_keys=128, programs_per_multiprocessor=2, num_warps=4, num_stages=num_stages)


class SplitAttention:
    """The first rows of a step, each with at most `max_queries` queries, for layers with some number of heads."""

    def __init__(
        self,
        metadata: AttentionMetadata,
        *,
        num_rows: int,
        max_queries: int,
        heads_per_kv: int,
        num_kv_heads: int,
        dim: int,
        value_dim: int,
        dtype: torch.dtype,
    ) -> None:
        """dim, value_dim: of heads. dtype: of queries."""
        self._metadata = metadata
        self._num_rows, self._heads_per_kv = num_rows, heads_per_kv
        per_row = max_queries * heads_per_kv
        self._tile = min(MAX_TILE, max(16, triton.next_power_of_2(per_row)))
        self._num_valid = min(self._tile, triton.next_power_of_2(per_row))
        self._num_tiles = triton.cdiv(per_row, self._tile)
        device = metadata.context_len.device
        self._config = decode_config(dim, value_dim, dtype)
        programs = runtime.num_multiprocessors(device) * self._config.programs_per_multiprocessor
        self._schedule: SplitSchedule = schedule_splits(
            metadata,
            num_rows=num_rows,
            num_wanted=triton.cdiv(programs, num_kv_heads * self._num_tiles),
            min_keys=self._config.min_keys,
        )
        self._is_fused = not runtime.is_hip()
        num_counters = num_rows * num_kv_heads * self._num_tiles if self._is_fused else 1
        self._arrived = torch.zeros(num_counters, dtype=torch.int32, device=device)

    def attend(
        self,
        query_THD: torch.Tensor,
        kv: KvLayerCache,
        out_THV: torch.Tensor,
        *,
        scale: float,
        sink_H: torch.Tensor | None,
    ) -> None:
        """Fill in the rows' part of `out_THV`."""
        num_kv_heads, value_dim = kv.value.shape[2:]
        num_parts = self._schedule.num_places * num_kv_heads * self._num_tiles * self._tile
        block_v = max(MIN_VALUE_BLOCK, triton.next_power_of_2(value_dim))
        part = torch.empty(num_parts, value_dim, dtype=torch.float32, device=query_THD.device)
        weight = torch.empty(num_parts, 2, dtype=torch.float32, device=query_THD.device)
        num_items = len(self._schedule.item_I8)
        shared = {
            "VALUE_D": value_dim,
            "GROUP": self._heads_per_kv,
            "TILE": self._tile,
            "HAS_SINK": sink_H is not None,
            "BLOCK_V": block_v,
            "ROWS": self._num_valid,
            "PARTS": max(1, min(16, PART_ELEMENTS // (self._num_valid * block_v))),
            "num_warps": self._config.num_warps,
            **launch_options(),
        }
        sink = query_THD if sink_H is None else sink_H
        _decode_kernel[(num_items * num_kv_heads * self._num_tiles,)](
            query_THD,
            kv.key,
            kv.value,
            out_THV,
            self._metadata.block_table,
            self._schedule.item_I8,
            sink,
            part,
            weight,
            self._arrived,
            scale * kv.key_scale * LOG2_E.value,
            float(kv.value_scale),
            num_kv_heads,
            self._num_tiles,
            *query_THD.stride()[:2],
            *kv.key.stride()[:3],
            *kv.value.stride()[:3],
            self._metadata.block_table.stride(0),
            BLOCK_SIZE=self._metadata.block_size,
            D=query_THD.shape[-1],
            BLOCK_D=max(16, triton.next_power_of_2(query_THD.shape[-1])),
            KEYS=self._config.keys,
            WINDOW=self._metadata.window or 0,
            IS_FUSED=self._is_fused,
            num_stages=self._config.num_stages,
            **shared,
        )
        if not self._is_fused:
            _combine_kernel[(self._num_rows, num_kv_heads * self._num_tiles)](
                out_THV,
                self._schedule.row_R2,
                self._metadata.query_start,
                sink,
                part,
                weight,
                float(kv.value_scale),
                num_kv_heads,
                self._num_tiles,
                **shared,
            )


@triton.jit(**varying("num_tiles", "table_stride"))
def _decode_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    table_ptr,
    item_ptr,
    sink_ptr,
    part_ptr,
    weight_ptr,
    arrived_ptr,
    scale,
    value_scale,
    num_kv_heads,
    num_tiles,
    query_token_stride,
    query_head_stride,
    key_page_stride,
    key_entry_stride,
    key_head_stride,
    value_page_stride,
    value_entry_stride,
    value_head_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    IS_FUSED: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: one item of the schedule, for one tile of queries of one key/value head."""
    kv_head = tl.program_id(0) % num_kv_heads
    tile = (tl.program_id(0) // num_kv_heads) % num_tiles
    item_ptr += tl.program_id(0) // (num_kv_heads * num_tiles) * 8
    # The schedule and the block table are older than the kernel before this one: `_arrived` was cleared in between.
    row = tl.load(item_ptr)
    begin = tl.load(item_ptr + 1)
    end = tl.load(item_ptr + 2)
    split = tl.load(item_ptr + 3)
    counts = tl.load(item_ptr + 4)
    num_splits = counts // 32
    num_queries = counts % 32
    first_place = tl.load(item_ptr + 5)
    query_start = tl.load(item_ptr + 6)
    first_position = tl.load(item_ptr + 7)
    table_ptr += row.to(tl.int64) * table_stride
    key_ptr += kv_head * key_head_stride
    value_ptr += kv_head * value_head_stride
    next_page = load_pages(table_ptr, begin + tl.arange(0, KEYS), end, BLOCK_SIZE)
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    if row < 0:
        return

    m = tile * TILE + tl.arange(0, TILE)
    index = m // GROUP
    head = kv_head * GROUP + m % GROUP
    is_query = index < num_queries
    query = load_queries(
        query_ptr, query_token_stride, query_head_stride, query_start + index, head, is_query, D, BLOCK_D
    )
    query_position = first_position + index
    acc = tl.zeros([TILE, BLOCK_V], tl.float32)
    highest = tl.full([TILE], LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for start in range(begin, end, KEYS):
        position = start + tl.arange(0, KEYS)
        page = next_page
        next_page = load_pages(table_ptr, position + KEYS, end, BLOCK_SIZE)
        acc, highest, total = attend_keys(
            query,
            acc,
            highest,
            total,
            position,
            position < end,
            query_position,
            key_ptr,
            value_ptr,
            entry_offsets(page, position, key_page_stride, key_entry_stride, BLOCK_SIZE),
            entry_offsets(page, position, value_page_stride, value_entry_stride, BLOCK_SIZE),
            scale,
            D,
            VALUE_D,
            BLOCK_D,
            BLOCK_V,
            WINDOW,
            is_masked=True,
        )

    dim = tl.arange(0, BLOCK_V)
    is_stored = is_query[:, None] & (dim < VALUE_D)[None, :]
    if num_splits == 1:
        mean = with_sink(acc, highest, total, sink_ptr, head, is_query, HAS_SINK) * value_scale
        out = ((query_start + index).to(tl.int64) * num_kv_heads * GROUP + head) * VALUE_D
        tl.store(out_ptr + out[:, None] + dim[None, :], mean, is_stored)
        return
    at = (((first_place + split).to(tl.int64) * num_kv_heads + kv_head) * num_tiles + tile) * TILE + tl.arange(0, TILE)
    tl.store(part_ptr + at[:, None] * VALUE_D + dim[None, :], acc, is_stored)
    tl.store(weight_ptr + at * 2, highest, is_query)
    tl.store(weight_ptr + at * 2 + 1, total, is_query)
    if IS_FUSED:
        barrier_behind_stores()
        arrived_ptr += (row * num_kv_heads + kv_head) * num_tiles + tile
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == num_splits - 1:
            tl.store(arrived_ptr, 0)
            _combine(
                out_ptr,
                part_ptr,
                weight_ptr,
                sink_ptr,
                first_place,
                num_splits,
                query_start,
                num_queries,
                kv_head,
                tile,
                num_kv_heads,
                num_tiles,
                value_scale,
                VALUE_D,
                BLOCK_V,
                GROUP,
                TILE,
                HAS_SINK,
                ROWS,
                PARTS,
            )


@triton.jit(**varying("num_tiles", "row_ptr", "query_start_ptr"))
def _combine_kernel(
    out_ptr,
    row_ptr,
    query_start_ptr,
    sink_ptr,
    part_ptr,
    weight_ptr,
    value_scale,
    num_kv_heads,
    num_tiles,
    VALUE_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SINK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: one row's tile of queries of one key/value head. For chips where `_decode_kernel` does not."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    row = tl.program_id(0)
    num_splits = tl.load(row_ptr + row * 2)
    if num_splits > 1:
        query_start = tl.load(query_start_ptr + row)
        _combine(
            out_ptr,
            part_ptr,
            weight_ptr,
            sink_ptr,
            tl.load(row_ptr + row * 2 + 1),
            num_splits,
            query_start,
            tl.load(query_start_ptr + row + 1) - query_start,
            tl.program_id(1) // num_tiles,
            tl.program_id(1) % num_tiles,
            num_kv_heads,
            num_tiles,
            value_scale,
            VALUE_D,
            BLOCK_V,
            GROUP,
            TILE,
            HAS_SINK,
            ROWS,
            PARTS,
        )


@triton.jit
def _combine(
    out_ptr,
    part_ptr,
    weight_ptr,
    sink_ptr,
    first_place,
    num_splits,
    query_start,
    num_queries,
    kv_head,
    tile,
    num_kv_heads,
    num_tiles,
    value_scale,
    VALUE_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SINK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The splits of a tile made one. Past the first-level caches, which may hold what was there before."""
    local = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_V)
    m = tile * TILE + local
    is_query = m < num_queries * GROUP
    is_inside = is_query[:, None] & (dim < VALUE_D)[None, :]
    place_stride = num_kv_heads * num_tiles * TILE
    base = (first_place.to(tl.int64) * num_kv_heads + kv_head) * num_tiles * TILE + tile * TILE
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first_split in range(0, num_splits, PARTS):
        split = first_split + tl.arange(0, PARTS)
        is_split = split < num_splits
        at = base + (split.to(tl.int64) * place_stride)[:, None] + local[None, :]
        is_part = is_split[:, None] & is_query[None, :]
        part_highest = tl.load(weight_ptr + at * 2, is_part, other=LOWEST, cache_modifier=".cg")
        part_total = tl.load(weight_ptr + at * 2 + 1, is_part, other=0.0, cache_modifier=".cg")
        part = tl.load(
            part_ptr + at[:, :, None] * VALUE_D + dim[None, None, :],
            is_split[:, None, None] & is_inside[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_highest = tl.maximum(highest, tl.max(part_highest, axis=0))
        shrink = tl.exp2(highest - new_highest)
        part_shrink = tl.exp2(part_highest - new_highest[None, :])
        acc = acc * shrink[:, None] + tl.sum(part * part_shrink[:, :, None], axis=0)
        total = total * shrink + tl.sum(part_total * part_shrink, axis=0)
        highest = new_highest
    head = kv_head * GROUP + m % GROUP
    mean = with_sink(acc, highest, total, sink_ptr, head, is_query, HAS_SINK) * value_scale
    out = ((query_start + m // GROUP).to(tl.int64) * num_kv_heads * GROUP + head) * VALUE_D
    tl.store(out_ptr + out[:, None] + dim[None, :], mean, is_inside)
