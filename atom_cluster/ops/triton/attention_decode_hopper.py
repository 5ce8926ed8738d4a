"""Attention of rows with few queries on sm_90: what `attention_decode` computes, by warps with different tasks.

Some warps copy keys and values to shared memory, what was there before this step even before its own are stored. Each
of the other four has keys of its own in every block, with a maximum and a sum of its own, so that they exchange nothing
until a row ends. All blocks of all rows are cut into equal parts, one for each program; the last program that has a
piece of a row puts the pieces together. Eight-bit numbers are read in pairs and widened to float16, which holds all of
them. Written in Gluon, which Triton calls experimental; `attention_decode` does without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.attention_decode_loads import load_blocks, next_row, span
from atom_cluster.ops.triton.attention_decode_pieces import finish_row
from atom_cluster.ops.triton.attention_parts import FIRST_LISTED, LISTED_UNITS, PART_FIELDS, schedule_parts
from atom_cluster.ops.triton.attention_tile import LOG2_E
from atom_cluster.ops.triton.runtime import varying

MAX_QUERIES = 32
"""Queries times heads of a key/value head, of 128 dims or fewer: what registers have room for."""

NUM_WARPS = 4
"""That compute."""

UNIT = 16
"""Keys of a warp in a block, which are of one page."""

KEYS = UNIT * NUM_WARPS
"""Of a block."""

SHARED_BYTES = 2 * 115712
"""Of a multiprocessor, for two programs."""

HAS_TASKS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
"""Whether this Triton has warps with different tasks as they are asked for here, and products of one warp."""

if HAS_TASKS:
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@dataclass(frozen=True, slots=True)
class HopperDecodeConfig:
    """How the kernel is cut for some dims and dtypes."""

    num_stages: int
    """Blocks in shared memory."""
    programs_per_multiprocessor: int
    min_blocks: int
    """Of a part."""


def is_fit(query_THD: torch.Tensor, kv: KvLayerCache, *, block_size: int, num_queries: int) -> bool:
    """Whether the kernel can be used. num_queries: of a key/value head, those of all of its heads."""
    dtype, kv_dtype, dim = query_THD.dtype, kv.key.dtype, query_THD.shape[-1]
    strides = (*kv.key.stride()[:3], *kv.value.stride()[:3])
    return (
        runtime.is_hopper()
        and HAS_TASKS
        and dtype.itemsize == 2
        and kv_dtype in (dtype, torch.float8_e4m3fn)
        and block_size % UNIT == 0
        and dim in (64, 128, 256)
        and num_queries <= (MAX_QUERIES if dim <= 128 else MAX_QUERIES // 2)
        and kv.value.shape[-1] == dim
        and all(stride * kv_dtype.itemsize % 32 == 0 for stride in strides)
        and kv.key.data_ptr() % 16 == kv.value.data_ptr() % 16 == 0
        and query_THD.stride(0) % 2 == query_THD.stride(1) % 2 == query_THD.data_ptr() % 4 == 0
        and query_THD.stride(2) == kv.key.stride(3) == kv.value.stride(3) == 1
    )


def hopper_decode_config(
    dim: int, kv_dtype: torch.dtype, *, num_queries: int, num_works: int, device: torch.device
) -> HopperDecodeConfig:
    """By the bytes of a block, and by what a program needs besides. num_works: rows times key/value heads."""
    block = 2 * KEYS * dim * kv_dtype.itemsize
    rows = _rows_of(num_queries)
    rest = 4 * NUM_WARPS * (rows * dim + 2 * max(16, rows)) + 512
    # Two programs share what they wait for better; one has all the memory of a multiprocessor under way at once.
    is_shared = num_works > 2 * runtime.num_multiprocessors(device) or dim * kv_dtype.itemsize <= 128
    programs = 2 if is_shared and rows * dim <= 16 * 128 and 3 * block + rest <= SHARED_BYTES // 2 else 1
    return HopperDecodeConfig(
        num_stages=min(12, (SHARED_BYTES // programs - rest) // block),
        programs_per_multiprocessor=programs,
        min_blocks=2,
    )


def _rows_of(num_queries: int) -> int:
    """That are computed with for them."""
    return max(8, triton.next_power_of_2(num_queries))


class HopperSplitAttention:
    """The first rows of a step, each with at most `max_queries` queries, for layers with some number of heads."""

    def __init__(
        self,
        metadata: AttentionMetadata,
        *,
        num_rows: int,
        max_queries: int,
        heads_per_kv: int,
        num_kv_heads: int,
        config: HopperDecodeConfig,
    ) -> None:
        self._metadata = metadata
        self._heads_per_kv = heads_per_kv
        self._rows = _rows_of(max_queries * heads_per_kv)
        self._config = config
        device = metadata.context_len.device
        programs = runtime.num_multiprocessors(device) * config.programs_per_multiprocessor
        self._num_parts = max(1, programs // num_kv_heads)
        self._item_P32 = schedule_parts(
            metadata,
            num_rows=num_rows,
            num_parts=self._num_parts,
            block=KEYS,
            unit=UNIT,
            min_blocks=config.min_blocks,
        )
        self._arrived = torch.zeros(num_rows * num_kv_heads, dtype=torch.int32, device=device)

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
        num_kv_heads, dim = kv.value.shape[2:]
        num_pieces = 2 * self._num_parts * num_kv_heads * self._rows
        piece = torch.empty(num_pieces, dim, dtype=torch.float32, device=query_THD.device)
        weight = torch.empty(num_pieces, 2, dtype=torch.float32, device=query_THD.device)
        is_narrow = kv.key.dtype.itemsize == 1
        # Pairs of numbers.
        query, key, value = query_THD, kv.key, kv.value
        if is_narrow:
            query, key, value = query.view(torch.int32), key.view(torch.int16), value.view(torch.int16)
        config = self._config
        threads = 2 * 32 * NUM_WARPS
        _decode_hopper_kernel[(num_kv_heads, self._num_parts)](
            query,
            key,
            value,
            out_THV,
            self._metadata.block_table,
            self._item_P32,
            self._metadata.query_start,
            self._metadata.context_len,
            query_THD if sink_H is None else sink_H,
            piece,
            weight,
            self._arrived,
            scale * kv.key_scale * LOG2_E.value,
            float(kv.value_scale),
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            self._metadata.block_table.stride(0),
            BLOCK_SIZE=self._metadata.block_size,
            D=dim,
            GROUP=self._heads_per_kv,
            ROWS=self._rows,
            STAGES=config.num_stages,
            FIELDS=PART_FIELDS,
            FIRST_LISTED=FIRST_LISTED,
            LISTED=LISTED_UNITS // NUM_WARPS,
            WINDOW=self._metadata.window or 0,
            HAS_SINK=sink_H is not None,
            IS_NARROW=is_narrow,
            UNIT=UNIT,
            num_warps=NUM_WARPS,
            maxnreg=min(255, 65536 // (threads * config.programs_per_multiprocessor) // 8 * 8),
            launch_pdl=True,
        )


@gluon.jit(**varying("query_start_ptr", "context_len_ptr", "table_stride"))
def _decode_hopper_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    table_ptr,
    item_ptr,
    query_start_ptr,
    context_len_ptr,
    sink_ptr,
    piece_ptr,
    weight_ptr,
    arrived_ptr,
    scale,
    value_scale,
    query_token_stride,
    query_head_stride,
    key_page_stride,
    key_entry_stride,
    key_head_stride,
    value_page_stride,
    value_entry_stride,
    value_head_stride,
    table_stride,
    BLOCK_SIZE: gl.constexpr,
    D: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    FIELDS: gl.constexpr,
    FIRST_LISTED: gl.constexpr,
    LISTED: gl.constexpr,
    WINDOW: gl.constexpr,
    HAS_SINK: gl.constexpr,
    IS_NARROW: gl.constexpr,
    UNIT: gl.constexpr,
):
    """One program: a part of all blocks of keys, of one key/value head."""
    WARPS: gl.constexpr = gl.num_warps()
    KV_D: gl.constexpr = D // 2 if IS_NARROW else D
    kv_head = gl.program_id(0)
    item_ptr += gl.program_id(1) * FIELDS
    # Parts, rows and the block table are older than the kernel before this one: `_arrived` was cleared in between.
    row = gl.load(item_ptr, eviction_policy="evict_last")
    block = gl.load(item_ptr + 1, eviction_policy="evict_last")
    end = gl.load(item_ptr + 2, eviction_policy="evict_last")
    row_begin = gl.load(item_ptr + 3, eviction_policy="evict_last")
    token = gl.load(item_ptr + 4, eviction_policy="evict_last")
    num_queries = gl.load(item_ptr + 5, eviction_policy="evict_last")
    length = gl.load(item_ptr + 6, eviction_policy="evict_last")
    first_part = gl.load(item_ptr + 7, eviction_policy="evict_last")
    num_pieces = gl.load(item_ptr + 8, eviction_policy="evict_last")
    last_pieces = gl.load(item_ptr + 9, eviction_policy="evict_last")
    if block >= end:
        return

    kv_type: gl.constexpr = key_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    key_smem = gl.allocate_shared_memory(kv_type, [STAGES, WARPS, UNIT, KV_D], swizzled)
    value_smem = gl.allocate_shared_memory(kv_type, [STAGES, WARPS, UNIT, KV_D], swizzled)
    # What each warp found, when a row ends: sums of weighted values; maxima and sums of weights.
    mixed_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    mixed_smem = gl.allocate_shared_memory(gl.float32, [WARPS, ROWS, D], mixed_layout)
    line_smem = gl.allocate_shared_memory(
        gl.float32, [2, WARPS, max(16, ROWS)], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=32 * WARPS)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    gl.thread_barrier()

    work = (row, block, end, row_begin, token, num_queries, length)
    pieces = (first_part, num_pieces, last_pieces)
    rows = (query_start_ptr, context_len_ptr)
    smem = (key_smem, value_smem, full, empty)
    found = (mixed_smem, line_smem)
    cache = (
        key_ptr + kv_head * key_head_stride,
        value_ptr + kv_head * value_head_stride,
        table_ptr,
        item_ptr + FIRST_LISTED,
        key_page_stride,
        key_entry_stride,
        value_page_stride,
        value_entry_stride,
        table_stride,
    )
    query_at = (query_ptr + kv_head * GROUP * query_head_stride, query_token_stride, query_head_stride)
    queries = (query_at, sink_ptr, kv_head, scale, value_scale)
    results = (out_ptr, piece_ptr, weight_ptr, arrived_ptr)
    gl.warp_specialize(
        [
            (
                _attend,
                (work, pieces, rows, queries, results, smem, found, D, GROUP, ROWS, WINDOW, HAS_SINK, IS_NARROW),
            ),
            (load_blocks, (work, rows, cache, smem, BLOCK_SIZE, LISTED, WINDOW)),
        ],
        [WARPS],
        [72],
    )


@gluon.jit
def _attend(
    work,
    pieces,
    rows,
    queries,
    results,
    smem,
    found,
    D: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    WINDOW: gl.constexpr,
    HAS_SINK: gl.constexpr,
    IS_NARROW: gl.constexpr,
):
    """Four warps, each with its own keys."""
    row, block, end, row_begin, token, num_queries, length = work
    query_at, sink_ptr, kv_head, scale, value_scale = queries
    key_smem, value_smem, full, empty = smem
    mixed_smem, line_smem = found
    first_part, num_pieces, last_pieces = pieces
    STAGES: gl.constexpr = key_smem.shape[0]
    WARPS: gl.constexpr = key_smem.shape[1]
    UNIT: gl.constexpr = key_smem.shape[2]
    KV_D: gl.constexpr = key_smem.shape[3]
    # Of the matrix units, which take sixteen at a time.
    M: gl.constexpr = max(16, ROWS)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    left_line: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, left))
    line: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, mma))
    per_warp: gl.constexpr = gl.SliceLayout(2, mma)
    out_ptr = results[0]
    dtype: gl.constexpr = gl.float16 if IS_NARROW else out_ptr.dtype.element_ty
    any_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, left)))[:, None, None]
    query_dim = gl.arange(0, KV_D, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :] + any_warp * 0
    query_m = gl.arange(0, M, layout=left_line)
    m = gl.arange(0, M, layout=line)[None, :, None]
    entry = gl.arange(0, UNIT, layout=gl.SliceLayout(0, gl.SliceLayout(1, mma)))[None, None, :]
    entry = entry + gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, mma)))[:, None, None] * UNIT
    nothing = gl.zeros([WARPS, M, UNIT], gl.float32, layout=mma)
    stage = 0
    phase = 0
    gdc_wait()
    gdc_launch_dependents()
    query = _load_queries(query_at, token, num_queries, query_m, query_dim, GROUP)
    while block < end:
        first, begin, row_end = span(row_begin, num_queries, length, WINDOW, WARPS, UNIT)
        until = gl.minimum(end, row_end)
        next_token, next_queries, next_length = next_row(rows, row, until < end)
        if IS_NARROW:
            query_even, query_odd, exponent = _unpack_queries(query, out_ptr.dtype.element_ty)
            factor = gl.convert_layout(exponent, per_warp)[:, :, None] * scale
            acc_odd = gl.zeros([WARPS, M, KV_D], gl.float32, layout=mma)
        else:
            factor = scale
        acc = gl.zeros([WARPS, M, KV_D], gl.float32, layout=mma)
        highest = gl.full([WARPS, M], -1.0e30, gl.float32, layout=per_warp)
        sums = gl.zeros([WARPS, M], gl.float32, layout=per_warp)
        position = begin + (block - row_begin) * (WARPS * UNIT) + entry
        seen = length - num_queries + m // GROUP
        for _ in range(block, until):
            mbarrier.wait(full.index(stage), phase)
            key = key_smem.index(stage).permute((0, 2, 1)).load(right)
            if IS_NARROW:
                key_even, key_odd = _widen(key)
                scores = mma_v2(query_even, key_even, nothing)
                scores = mma_v2(query_odd, key_odd, scores)
            else:
                scores = mma_v2(query, key, nothing)
            is_visible = (position <= seen) & (position < length)
            if WINDOW > 0:
                is_visible &= position > seen - WINDOW
            scores = gl.where(is_visible, scores * factor, float("-inf"))
            position += WARPS * UNIT
            new_highest = gl.maximum(highest, gl.max(scores, axis=2))
            weights = gl.exp2(scores - new_highest[:, :, None])
            kept = gl.exp2(highest - new_highest)
            sums = sums * kept + gl.sum(weights, axis=2)
            highest = new_highest
            rounded = gl.convert_layout(weights.to(dtype), left)
            value = value_smem.index(stage).load(right)
            acc = acc * kept[:, :, None]
            if IS_NARROW:
                acc_odd = acc_odd * kept[:, :, None]
                value_even, value_odd = _widen(value)
                acc = mma_v2(rounded, value_even, acc)
                acc_odd = mma_v2(rounded, value_odd, acc_odd)
            else:
                acc = mma_v2(rounded, value, acc)
            mbarrier.arrive(empty.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        # On their way while this row ends.
        query = _load_queries(query_at, next_token, next_queries, query_m, query_dim, GROUP)
        mixed = gl.reshape(gl.join(acc, acc_odd), [WARPS, M, D]) if IS_NARROW else acc
        if ROWS == 8:
            mixed, _ = gl.split(gl.permute(gl.reshape(mixed, [WARPS, 2, 8, D]), (0, 2, 3, 1)))
        if until > block:
            mixed_smem.store(mixed)
            line_smem.index(0).store(highest)
            line_smem.index(1).store(sums)
            where = (row, block, until, row_begin, row_end, token, num_queries, kv_head, first_part, num_pieces)
            finish_row(found, where, sink_ptr, value_scale, results, GROUP, ROWS, D, HAS_SINK)
        block = until
        row_begin = row_end
        token = next_token
        num_queries = next_queries
        length = next_length
        row += 1
        # Rows behind the first begin here, and all but the last end here.
        first_part = gl.program_id(1)
        num_pieces = last_pieces


@gluon.jit
def _load_queries(query_at, token, num_queries, m, dim, GROUP: gl.constexpr):
    """[warps, M, dims or pairs of them], every warp's the same. Zero where there is none."""
    query_ptr, token_stride, head_stride = query_at
    at = (token + m // GROUP).to(gl.int64) * token_stride + m % GROUP * head_stride
    return gl.load(query_ptr + at[None, :, None] + dim, mask=(m < num_queries * GROUP)[None, :, None], other=0)


@gluon.jit
def _unpack_queries(query, dtype: gl.constexpr):
    """Of pairs of `dtype`, the first and the second as float16, over a power of two, so that nothing is lost."""
    even = query.to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    odd = (query >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    largest = gl.max(gl.maximum(gl.abs(even), gl.abs(odd)), axis=2)
    exponent = gl.minimum(largest.to(gl.int32, bitcast=True) & 0x7F800000, 253 << 23)
    inverse = ((254 << 23) - exponent).to(gl.float32, bitcast=True)[:, :, None]
    return (even * inverse).to(gl.float16), (odd * inverse).to(gl.float16), exponent.to(gl.float32, bitcast=True)


@gluon.jit
def _widen(pairs):
    """Of pairs of eight-bit numbers, the first and the second as float16."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 sorted;
        .reg .b16 low, high;
        prmt.b32 sorted, $2, 0, 0x3120;
        mov.b32 {low, high}, sorted;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        }
        """,
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )
