"""Attention of rows with many queries on sm_90: what `attention_prefill` computes, by warps with different tasks.

One warp has keys and values copied out of their pages to shared memory as room becomes free there. Two times four warps
have 64 queries each: while their products with values are computed, they work on the scores of the next keys, and while
one four are at that, the other's products fill the matrix units. Sixteen-bit numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.attention_decode_hopper import HAS_TASKS
from atom_cluster.ops.triton.attention_prefill import list_tiles
from atom_cluster.ops.triton.attention_tile import LOG2_E
from atom_cluster.ops.triton.bulk_copies import box_layout
from atom_cluster.ops.triton.repeated import RepeatedKernel
from atom_cluster.ops.triton.runtime import varying

BLOCKS = {64: 128, 128: 128, 256: 64}
"""By dims of heads: keys in one place of shared memory."""
BLOCK_M = 128
"""Queries times heads of a key/value head, of one program."""
STAGES = 2
MIN_KEYS = {64: 1024, 128: 512, 256: 512}
"""Of a row, and of a window, by dims: with fewer, a program is over before its warps have much to do, and
`attention_prefill` is faster."""
UNIT = 16
"""Keys that are copied at once: of one page."""
PANEL = 64
"""Dims that are copied at once, a line of shared memory."""


def is_fit(query_THD: torch.Tensor, kv: KvLayerCache, metadata: AttentionMetadata) -> bool:
    """Whether the kernel can be used."""
    return (
        runtime.is_hopper()
        and HAS_TASKS
        and query_THD.shape[-1] in BLOCKS
        and metadata.block_size % UNIT == 0
        and query_THD.dtype in (torch.bfloat16, torch.float16)
        and query_THD.dtype == kv.key.dtype
        and query_THD.shape[-1] == kv.value.shape[-1]
        and query_THD.stride(0) % 8 == query_THD.stride(1) % 8 == 0
        and query_THD.stride(2) == 1
        and _has_lines(kv.key)
        and _has_lines(kv.value)
    )


def is_faster(num_keys: int, window: int | None, dim: int) -> bool:
    """Whether a row with so many keys is the kernel's. It alone decides that, so that rows do not depend on others."""
    return min(num_keys, num_keys if window is None else window) >= MIN_KEYS[dim]


def _has_lines(paged: torch.Tensor) -> bool:
    """Whether the memory can be seen as lines, each an entry's heads, of which a page is so many later."""
    page, entry, head, dim = paged.stride()
    return (
        dim == 1 and page % entry == 0 and entry % 8 == head % 8 == 0 and entry >= head and paged.data_ptr() % 16 == 0
    )


class HopperTiledAttention:
    """Some rows of a step, for layers with some number of heads."""

    def __init__(self, metadata: AttentionMetadata, *, rows: Sequence[int], heads_per_kv: int) -> None:
        self._metadata, self._heads_per_kv = metadata, heads_per_kv
        self._tile_I2 = list_tiles(metadata, rows, BLOCK_M, heads_per_kv)
        self._kernel = RepeatedKernel(attend_kernel)

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
        num_kv_heads, dim = kv.key.shape[2:]
        if not len(self._tile_I2):
            return
        metadata = self._metadata
        self._kernel.launch(
            len(self._tile_I2) * num_kv_heads,
            (
                query_THD,
                _units_of(kv.key),
                _units_of(kv.value),
                out_THV,
                metadata.block_table,
                self._tile_I2,
                metadata.query_start,
                metadata.context_len,
                query_THD if sink_H is None else sink_H,
            ),
            (
                scale * kv.key_scale * LOG2_E.value,
                float(kv.value_scale),
                num_kv_heads,
                query_THD.stride(0) // 8,
                query_THD.stride(1) // 8,
                kv.key.stride(0) // kv.key.stride(1),
                kv.value.stride(0) // kv.value.stride(1),
                kv.key.stride(2),
                kv.value.stride(2),
                len(kv.key),
                metadata.block_table.stride(0),
            ),
            {
                "BLOCK_SIZE": metadata.block_size,
                "GROUP": self._heads_per_kv,
                "D": dim,
                "WINDOW": metadata.window or 0,
                "HAS_SINK": sink_H is not None,
                "LOG2E": LOG2_E.value,
                "BLOCK_M": BLOCK_M,
                "BLOCK_N": BLOCKS[dim],
                "UNIT": UNIT,
                "PANEL": PANEL,
                "STAGES": STAGES,
            },
            {"num_warps": 4},
        )


def _units_of(paged: torch.Tensor) -> TensorDescriptor:
    """Of [pages, entries, heads, D], as lines of an entry's heads, whatever lies between pages."""
    num_pages, block_size, num_heads, dim = paged.shape
    page, entry, head, _ = paged.stride()
    lines = [(num_pages - 1) * (page // entry) + block_size, (num_heads - 1) * head + dim]
    return TensorDescriptor(paged, lines, [entry, 1], [UNIT, PANEL], box_layout(UNIT, PANEL, paged.dtype))


@gluon.jit(**varying("query_start_ptr", "context_len_ptr", "table_stride"))
def attend_kernel(
    query_ptr,
    key_desc,
    value_desc,
    out_ptr,
    table_ptr,
    tile_ptr,
    query_start_ptr,
    context_len_ptr,
    sink_ptr,
    scale,
    value_scale,
    num_kv_heads,
    query_token_eighths,
    query_head_eighths,
    key_page_lines,
    value_page_lines,
    key_head_stride,
    value_head_stride,
    num_pages,
    table_stride,
    BLOCK_SIZE: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    WINDOW: gl.constexpr,
    HAS_SINK: gl.constexpr,
    LOG2E: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    UNIT: gl.constexpr,
    PANEL: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program: a tile of a row's queries, of one key/value head. Index m of a row is query m // GROUP.

    Eighths of strides tell the compiler that these are multiples of eight.
    """
    kv_head = gl.program_id(0) % num_kv_heads
    item = gl.program_id(0) // num_kv_heads
    row = gl.load(tile_ptr + item * 2)
    first_m = gl.load(tile_ptr + item * 2 + 1) * BLOCK_M
    token = gl.load(query_start_ptr + row)
    num_queries = gl.load(query_start_ptr + row + 1) - token
    length = gl.load(context_len_ptr + row)
    num_cached = length - num_queries
    num_keys = num_cached + gl.minimum((first_m + BLOCK_M - 1) // GROUP + 1, num_queries)
    num_blocks = gl.cdiv(num_keys, BLOCK_N)
    first_key = num_cached * 0
    if WINDOW > 0:
        first_key = gl.maximum(num_cached + first_m // GROUP - WINDOW + 1, 0)

    dtype: gl.constexpr = query_ptr.dtype.element_ty
    HALF: gl.constexpr = BLOCK_M // 2
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], dtype)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(dtype, [2, HALF, D], q_layout)
    key_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_layout)
    value_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_layout)
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

    # A place is panels of lines, of which a page's are a unit: the same memory, as copies see it.
    num_units: gl.constexpr = STAGES * (D // PANEL) * (BLOCK_N // UNIT)
    key_units = key_smem._reinterpret(dtype, [num_units, UNIT, PANEL], key_desc.layout)
    value_units = value_smem._reinterpret(dtype, [num_units, UNIT, PANEL], value_desc.layout)
    tile = (first_m, first_key, num_blocks, num_queries, num_cached, length)
    barriers = (key_full, key_empty, value_full, value_empty)
    q_ptr = query_ptr + token.to(gl.int64) * (query_token_eighths * 8)
    q_ptr += kv_head * GROUP * (query_head_eighths * 8)
    o_ptr = out_ptr + (token.to(gl.int64) * num_kv_heads + kv_head) * (GROUP * D)
    memory = (q_ptr, o_ptr, query_token_eighths, query_head_eighths, num_kv_heads)
    stages = (key_smem, value_smem, value_units)
    scales = (scale, value_scale, sink_ptr + kv_head * GROUP)
    pages = (table_ptr + row.to(gl.int64) * table_stride, num_pages)
    lines = (key_page_lines, value_page_lines, kv_head * key_head_stride, kv_head * value_head_stride)
    gl.warp_specialize(
        [
            (_attend, (memory, tile, scales, q_smem.index(0), stages, barriers, 0, GROUP, WINDOW, HAS_SINK, LOG2E)),
            (_attend, (memory, tile, scales, q_smem.index(1), stages, barriers, HALF, GROUP, WINDOW, HAS_SINK, LOG2E)),
            (
                _load,
                (
                    key_desc,
                    value_desc,
                    pages,
                    lines,
                    tile,
                    key_units,
                    value_units,
                    barriers,
                    BLOCK_SIZE,
                    BLOCK_N,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


@gluon.jit
def _load(
    key_desc,
    value_desc,
    pages,
    lines,
    tile,
    key_units,
    value_units,
    barriers,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One warp: has the blocks copied, the last first."""
    key_page_lines, value_page_lines, key_column, value_column = lines
    first_m, first_key, num_blocks, num_queries, num_cached, length = tile
    key_full, key_empty, value_full, value_empty = barriers
    UNIT: gl.constexpr = key_units.shape[1]
    PANEL: gl.constexpr = key_units.shape[2]
    UNITS: gl.constexpr = BLOCK_N // UNIT
    PER_STAGE: gl.constexpr = key_units.shape[0] // STAGES
    NUM_BYTES: gl.constexpr = PER_STAGE * key_desc.block_type.nbytes
    num_done = num_blocks - first_key // BLOCK_N
    for done in range(num_done):
        start = (num_blocks - 1 - done) * BLOCK_N
        stage = done % STAGES
        phase = (done // STAGES) & 1
        mbarrier.wait(key_empty.index(stage), phase ^ 1)
        full = key_full.index(stage)
        mbarrier.expect(full, NUM_BYTES)
        for unit in gl.static_range(UNITS):
            at = _line_of(pages, key_page_lines, start + unit * UNIT, first_key, length, UNIT, BLOCK_SIZE)
            for panel in gl.static_range(PER_STAGE // UNITS):
                to = key_units.index(stage * PER_STAGE + panel * UNITS + unit)
                tma.async_copy_global_to_shared(key_desc, [at, key_column + panel * PANEL], full, to)
        mbarrier.wait(value_empty.index(stage), phase ^ 1)
        full = value_full.index(stage)
        mbarrier.expect(full, NUM_BYTES)
        for unit in gl.static_range(UNITS):
            at = _line_of(pages, value_page_lines, start + unit * UNIT, first_key, length, UNIT, BLOCK_SIZE)
            for panel in gl.static_range(PER_STAGE // UNITS):
                to = value_units.index(stage * PER_STAGE + panel * UNITS + unit)
                tma.async_copy_global_to_shared(value_desc, [at, value_column + panel * PANEL], full, to)


@gluon.jit
def _line_of(pages, page_lines, position, first_key, length, UNIT: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Of an entry; behind a row's last page and before its window a line behind the memory: copies of it are zeros."""
    table_ptr, num_pages = pages
    is_page = (position < length) & (position + UNIT > first_key)
    page = gl.load(table_ptr + position // BLOCK_SIZE, mask=is_page, other=num_pages)
    return page * page_lines + position % BLOCK_SIZE


@gluon.jit
def _clear(value_units, unit, begin, end, UNITS: gl.constexpr, PANELS: gl.constexpr):
    """Zeros for the entries of a unit before `begin` and from `end` on, which no query sees.

    Weights are zero there, but what is left in a page may be no number. Both fours do the same, neither waits.
    """
    UNIT: gl.constexpr = value_units.shape[1]
    PANEL: gl.constexpr = value_units.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // PANEL, PANEL // 8], [4, 1], [1, 0])
    entry = gl.arange(0, UNIT, layout=gl.SliceLayout(1, layout))
    is_seen = (entry >= begin) & (entry < end)
    for panel in gl.static_range(PANELS):
        box = value_units.index(unit + panel * UNITS)
        x = box.load(layout)
        box.store(gl.where(is_seen[:, None], x, 0.0))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _attend(
    memory,
    tile,
    scales,
    q_smem,
    stages,
    barriers,
    FIRST: gl.constexpr,
    GROUP: gl.constexpr,
    WINDOW: gl.constexpr,
    HAS_SINK: gl.constexpr,
    LOG2E: gl.constexpr,
):
    """Four warps: half of the queries of a tile, from `FIRST` on."""
    q_ptr, o_ptr, q_token_eighths, q_head_eighths, num_kv_heads = memory
    first_m, first_key, num_blocks, num_queries, num_cached, length = tile
    scale, value_scale, sink_ptr = scales
    key_smem, value_smem, value_units = stages
    key_full, key_empty, value_full, value_empty = barriers
    M: gl.constexpr = q_smem.shape[0]
    D: gl.constexpr = q_smem.shape[1]
    BLOCK_N: gl.constexpr = key_smem.shape[1]
    STAGES: gl.constexpr = key_smem.shape[0]
    UNIT: gl.constexpr = value_units.shape[1]
    UNITS: gl.constexpr = BLOCK_N // UNIT
    PANELS: gl.constexpr = D // value_units.shape[2]
    dtype: gl.constexpr = q_smem.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    mixed_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, mixed_layout, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    m_wide = first_m + FIRST + gl.arange(0, M, layout=gl.SliceLayout(1, wide))
    m_score = first_m + FIRST + gl.arange(0, M, layout=gl.SliceLayout(1, score_layout))
    entry = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, score_layout))
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, wide))[None, :]
    no_scores = gl.zeros([M, BLOCK_N], gl.float32, layout=score_layout)
    index = m_wide // GROUP
    is_query = (index < num_queries)[:, None]
    q_offset = index.to(gl.int64) * (q_token_eighths * 8) + m_wide % GROUP * (q_head_eighths * 8)
    q_smem.store(gl.load(q_ptr + q_offset[:, None] + dim, mask=is_query, other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    sees = num_cached + m_score // GROUP

    mbarrier.wait(key_full.index(0), 0)
    scores = warpgroup_mma(q_smem, key_smem.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(key_empty.index(0))
    scores = _seen(scores, (num_blocks - 1) * BLOCK_N + entry, sees, WINDOW)
    highest = gl.maximum(gl.max(scores, axis=1) * scale, -1.0e30)
    weight = gl.exp2(scores * scale - highest[:, None])
    total = gl.sum(weight, axis=1)
    mixed = gl.zeros([M, D], gl.float32, layout=mixed_layout)
    rounded = gl.convert_layout(weight.to(dtype), weight_layout)
    num_there = length - (num_blocks - 1) * BLOCK_N
    mbarrier.wait(value_full.index(0), 0)
    if (num_there < BLOCK_N) & (num_there % UNIT > 0):
        _clear(value_units, num_there // UNIT, 0, num_there % UNIT, UNITS, PANELS)

    count = 0
    stage = 0
    first_whole = first_key // BLOCK_N
    if WINDOW > 0:
        last = num_cached + gl.minimum((first_m + FIRST + M - 1) // GROUP, num_queries - 1)
        first_whole = gl.cdiv(gl.maximum(last - WINDOW + 1, 0), BLOCK_N)
    num_whole = gl.minimum((num_cached + (first_m + FIRST) // GROUP + 1) // BLOCK_N, num_blocks - 1)
    first_whole = gl.minimum(first_whole, num_whole)
    for part in gl.static_range(3 if WINDOW > 0 else 2):
        # Blocks that are masked, those that are not, and those that windows begin in.
        begin = num_blocks - 1
        end = num_whole
        if part == 1:
            begin = num_whole
            end = first_whole
        if part == 2:
            begin = first_whole
            end = first_key // BLOCK_N
        for done in range(begin - end):
            value_stage = stage
            value_phase = (count // STAGES) & 1
            count += 1
            stage = count % STAGES
            mbarrier.wait(key_full.index(stage), (count // STAGES) & 1)
            scores = warpgroup_mma(
                q_smem, key_smem.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
            )
            mbarrier.wait(value_full.index(value_stage), value_phase)
            mixed = warpgroup_mma(rounded, value_smem.index(value_stage), mixed, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(key_empty.index(stage))
            if part != 1:
                scores = _seen(scores, (begin - 1 - done) * BLOCK_N + entry, sees, WINDOW)
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
    if first_key % UNIT > 0:
        unit = stage * (UNITS * PANELS) + first_key % BLOCK_N // UNIT
        _clear(value_units, unit, first_key % UNIT, UNIT, UNITS, PANELS)
    mixed = warpgroup_mma(rounded, value_smem.index(stage), mixed, is_async=True)
    mixed = warpgroup_mma_wait(0, deps=[mixed])

    if HAS_SINK:
        sink = gl.load(sink_ptr + m_score % GROUP).to(gl.float32) * LOG2E
        new_highest = gl.maximum(highest, sink)
        kept = gl.exp2(highest - new_highest)
        total = total * kept + gl.exp2(sink - new_highest)
        value_scale = value_scale * kept
    mixed = mixed * gl.convert_layout(value_scale / total, gl.SliceLayout(1, mixed_layout))[:, None]
    # Queries' place is free: lines are written as wholes.
    gl.thread_barrier()
    q_smem.store(mixed.to(dtype))
    gl.thread_barrier()
    o_offset = index.to(gl.int64) * (num_kv_heads * (GROUP * D)) + m_wide % GROUP * D
    gl.store(o_ptr + o_offset[:, None] + dim, q_smem.load(wide), mask=is_query)


@gluon.jit
def _seen(scores, position, sees, WINDOW: gl.constexpr):
    """Scores of keys that queries see."""
    is_seen = position[None, :] <= sees[:, None]
    if WINDOW > 0:
        is_seen &= position[None, :] > sees[:, None] - WINDOW
    return gl.where(is_seen, scores, float("-inf"))
