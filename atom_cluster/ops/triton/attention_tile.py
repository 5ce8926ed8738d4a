"""The parts that attention kernels have in common: reading keys and values from pages, and the running softmax.

A tile has one key/value head's keys against queries of one row, the query heads of that head one after the other:
index m of a row is query m // GROUP, head m % GROUP. Scores are powers of two, their scale includes log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)
"""A maximum of nothing: finite, so that differences are never infinity minus infinity."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_queries(query_ptr, token_stride, head_stride, token, head, is_query, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[M, BLOCK_D], zero where there is none."""
    dim = tl.arange(0, BLOCK_D)
    ptrs = query_ptr + (token.to(tl.int64) * token_stride + head * head_stride)[:, None] + dim[None, :]
    return tl.load(ptrs, is_query[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit
def load_pages(table_ptr, position, end, BLOCK_SIZE: tl.constexpr):
    """Pages of a row's positions below `end`. `table_ptr`: the row's part of the block table.

    Loops ask one iteration ahead: copies of entries can then be started several iterations ahead.
    """
    return tl.load(table_ptr + position // BLOCK_SIZE, position < end, other=0)


@triton.jit
def entry_offsets(page, position, page_stride, entry_stride, BLOCK_SIZE: tl.constexpr):
    """Where the entries of positions start, in elements."""
    return page.to(tl.int64) * page_stride + (position % BLOCK_SIZE) * entry_stride


@triton.jit
def load_entries(ptr, offset, is_key, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[N, BLOCK] of what starts at `ptr + offset`. Zero behind DIM and where there is no key."""
    dim = tl.arange(0, BLOCK)
    ptrs = ptr + offset[:, None] + dim[None, :]
    if DIM == BLOCK:
        entries = tl.load(ptrs, is_key[:, None], other=0.0)
    else:
        entries = tl.load(ptrs, is_key[:, None] & (dim < DIM)[None, :], other=0.0)
    return entries


@triton.jit
def attend_keys(
    query,
    acc,
    highest,
    total,
    position,
    is_key,
    query_position,
    key_ptr,
    value_ptr,
    key_offset,
    value_offset,
    scale,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WINDOW: tl.constexpr,
    is_masked,
):
    """The running (sum of weighted values, maximum, sum of weights) with some more keys.

    is_masked: not all queries see all of them.
    """
    key = load_entries(key_ptr, key_offset, is_key, D, BLOCK_D).to(query.dtype)
    score = tl.dot(query, tl.trans(key), input_precision="ieee")
    if is_masked:
        is_visible = is_key[None, :] & (position[None, :] <= query_position[:, None])
        if WINDOW > 0:
            is_visible &= position[None, :] > query_position[:, None] - WINDOW
        score = tl.where(is_visible, score, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(score, axis=1) * scale)
    weight = tl.exp2(score * scale - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weight, axis=1)
    acc = acc * shrink[:, None]
    value = load_entries(value_ptr, value_offset, is_key, VALUE_D, BLOCK_V).to(query.dtype)
    acc = tl.dot(weight.to(query.dtype), value, acc, input_precision="ieee")
    return acc, new_highest, total


@triton.jit
def with_sink(acc, highest, total, sink_ptr, head, is_query, HAS_SINK: tl.constexpr):
    """The weighted mean of values, with the sinks' share of the weights."""
    if HAS_SINK:
        sink = tl.load(sink_ptr + head, is_query, other=0.0).to(tl.float32) * LOG2_E
        new_highest = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.exp2(sink - new_highest)
        acc = acc * shrink[:, None]
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]
