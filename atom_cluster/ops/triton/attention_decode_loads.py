"""Blocks of keys and values to shared memory, for `attention_decode_hopper`: from whichever pages, as early as can be.

Knows no queries.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier
from triton.language.extra.cuda import gdc_wait


@gluon.jit
def next_row(rows, row, is_more):
    """(first token, tokens, entries) of the row behind, if there is one."""
    query_start_ptr, context_len_ptr = rows
    token = gl.load(query_start_ptr + row + 1, mask=is_more, other=0)
    behind = gl.load(query_start_ptr + row + 2, mask=is_more, other=0)
    return token, behind - token, gl.load(context_len_ptr + row + 1, mask=is_more, other=0)


@gluon.jit
def span(row_begin, num_queries, length, WINDOW: gl.constexpr, WARPS: gl.constexpr, UNIT: gl.constexpr):
    """(first key that a query of the row sees, the key that its blocks begin with, the block behind its last)"""
    first = length * 0
    if WINDOW > 0:
        first = gl.maximum(length - num_queries - WINDOW + 1, 0)
    begin = first // UNIT * UNIT
    num_blocks = (length - begin + WARPS * UNIT - 1) // (WARPS * UNIT)
    return first, begin, row_begin + gl.where(num_queries > 0, num_blocks, 0)


@gluon.jit
def load_blocks(work, rows, cache, smem, BLOCK_SIZE: gl.constexpr, LISTED: gl.constexpr, WINDOW: gl.constexpr):
    """Four warps: copy keys and values, as far ahead as there is room. What a warp copies is of one page."""
    row, block, end, row_begin, token, num_queries, length = work
    key_ptr, value_ptr, table_ptr, listed_ptr, key_page, key_entry, value_page, value_entry, table_stride = cache
    key_smem, value_smem, full, empty = smem
    STAGES: gl.constexpr = key_smem.shape[0]
    WARPS: gl.constexpr = key_smem.shape[1]
    UNIT: gl.constexpr = key_smem.shape[2]
    KV_D: gl.constexpr = key_smem.shape[3]
    lanes: gl.constexpr = min(32, KV_D // 8)
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // lanes, lanes], [WARPS, 1, 1], [2, 1, 0])
    unit_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    entry_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    unit = gl.arange(0, WARPS, layout=unit_layout) * UNIT
    entry = gl.arange(0, UNIT, layout=entry_layout)[None, :, None]
    dim = gl.arange(0, KV_D, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    key_offset = entry * key_entry + dim
    value_offset = entry * value_entry + dim
    # Where lines of memory begin.
    lines: gl.constexpr = (KV_D * 2 + 127) // 128
    line_layout: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 32 // lines, lines], [WARPS, 1, 1], [2, 1, 0])
    line_entry = gl.arange(0, UNIT, layout=gl.SliceLayout(0, gl.SliceLayout(2, line_layout)))[None, :, None]
    line_dim = gl.arange(0, lines, layout=gl.SliceLayout(0, gl.SliceLayout(1, line_layout)))[None, None, :] * 64
    line_unit_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, line_layout))
    listed_ptr += gl.arange(0, WARPS, layout=unit_layout)
    # Of how many blocks more it is known from the beginning which pages they are on.
    listed = LISTED
    is_new = True
    stage = 0
    phase = 1
    while block < end:
        first, begin, row_end = span(row_begin, num_queries, length, WINDOW, WARPS, UNIT)
        until = gl.minimum(end, row_end)
        token, next_queries, next_length = next_row(rows, row, until < end)
        row_table = table_ptr + row.to(gl.int64) * table_stride
        start = begin + (block - row_begin) * (WARPS * UNIT)
        position = start + unit
        page_ptr = gl.where(listed > 0, listed_ptr, row_table + position // BLOCK_SIZE)
        page = gl.load(page_ptr, mask=position < length, other=0)
        for _ in range(block, until):
            inside = position % BLOCK_SIZE
            key_at = page.to(gl.int64) * key_page + inside * key_entry
            value_at = page.to(gl.int64) * value_page + inside * value_entry
            # Of the keys of a warp, those that there are.
            is_entry = entry < (length - position)[:, None, None]
            if WINDOW > 0:
                is_entry &= entry >= (first - position)[:, None, None]
            start += WARPS * UNIT
            if is_new & (start > length - num_queries):
                # Some of them are of this step. The others can be on their way until those are there.
                last = gl.convert_layout(length - 1 - position, line_unit_layout)[:, None, None]
                at = gl.maximum(gl.minimum(line_entry, last), 0)
                _fetch(key_ptr + gl.convert_layout(key_at, line_unit_layout)[:, None, None] + at * key_entry + line_dim)
                _fetch(
                    value_ptr
                    + gl.convert_layout(value_at, line_unit_layout)[:, None, None]
                    + at * value_entry
                    + line_dim
                )
                gdc_wait()
                is_new = False
            position += WARPS * UNIT
            listed_ptr += WARPS
            listed -= 1
            page_ptr = gl.where(listed > 0, listed_ptr, row_table + position // BLOCK_SIZE)
            page = gl.load(page_ptr, mask=position < length, other=0)
            mbarrier.wait(empty.index(stage), phase)
            async_copy.async_copy_global_to_shared(
                key_smem.index(stage), key_ptr + key_at[:, None, None] + key_offset, mask=is_entry
            )
            async_copy.async_copy_global_to_shared(
                value_smem.index(stage), value_ptr + value_at[:, None, None] + value_offset, mask=is_entry
            )
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        block = until
        row_begin = row_end
        num_queries = next_queries
        length = next_length
        row += 1
        listed = 0
    async_copy.wait_group(0)


@gluon.jit
def _fetch(ptrs):
    """Starts to bring lines of memory into the cache that all programs share."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], dtype=gl.int32, is_pure=False, pack=1
    )
