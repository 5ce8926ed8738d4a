"""Shares the keys of a step's short rows out to programs, on the device: the host does not know how long rows are.

A row's keys are cut into splits, so that all items of work are about equally long and their number has a bound that
only static shapes decide. Knows no heads and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import room_for, varying

ITEM_FIELDS = 8
"""All that a program has to know, in one piece of memory: row (-1: nothing to do), first key, key behind the last,
which split of the row, splits of the row times 32 plus its queries (31 at most), the first split's place in scratch
memory if there are several, first token of the row in the step, and its position."""

_ITEMS_PER_PROGRAM = 8


@dataclass(frozen=True, slots=True)
class SplitSchedule:
    """Items of work, and which of them make up a row."""

    item_I8: torch.Tensor
    """[I, 8] int32, see `ITEM_FIELDS`."""
    row_R2: torch.Tensor
    """[R, 2] int32: splits of the row, and the first one's place in scratch memory if there are several."""
    num_places: int
    """Places in scratch memory that items can have."""


def schedule_splits(metadata: AttentionMetadata, *, num_rows: int, num_wanted: int, min_keys: int) -> SplitSchedule:
    """Cut the first `num_rows` rows' keys into about `num_wanted` items, of `min_keys` keys or more.

    There are at most `num_rows + num_wanted` items, and of those that are not all of a row, `2 * num_wanted`.
    """
    num_items = num_rows + num_wanted
    device = metadata.context_len.device
    item_I8 = torch.empty(num_items, ITEM_FIELDS, dtype=torch.int32, device=device)
    row_R2 = torch.empty(num_rows, 2, dtype=torch.int32, device=device)
    _schedule_kernel[(triton.cdiv(num_items, _ITEMS_PER_PROGRAM),)](
        metadata.query_start,
        metadata.context_len,
        item_I8,
        row_R2,
        num_rows,
        num_items,
        num_wanted,
        MIN_KEYS=min_keys,
        WINDOW=metadata.window or 0,
        ROW_BLOCK=room_for(num_rows),
        ITEMS=_ITEMS_PER_PROGRAM,
        num_warps=4,
        **launch_options(),
    )
    return SplitSchedule(item_I8, row_R2, 2 * num_wanted)


@triton.jit(**varying("query_start_ptr", "context_len_ptr", "row_ptr", "num_rows", "num_items", "num_wanted"))
def _schedule_kernel(
    query_start_ptr,
    context_len_ptr,
    item_ptr,
    row_ptr,
    num_rows,
    num_items,
    num_wanted,
    MIN_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    ITEMS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: some items. Every program works all rows out; the first writes them down."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    row = tl.arange(0, ROW_BLOCK)
    is_row = row < num_rows
    end = tl.load(context_len_ptr + row, is_row, other=0)
    query_start = tl.load(query_start_ptr + row, is_row, other=0)
    num_queries = tl.load(query_start_ptr + row + 1, is_row, other=0) - query_start
    first = tl.zeros([ROW_BLOCK], tl.int32)
    if WINDOW > 0:
        first = tl.maximum(end - num_queries - WINDOW + 1, 0)
    num_keys = tl.where(num_queries > 0, end - first, 0)
    wanted_keys = tl.cdiv(tl.sum(num_keys), num_wanted)
    split_keys = tl.cdiv(tl.maximum(wanted_keys, 1), MIN_KEYS) * MIN_KEYS
    # Making one of two splits costs more than it takes to read one after the other.
    num_splits = tl.where(num_keys > 2 * split_keys, tl.cdiv(num_keys, split_keys), tl.minimum(num_keys, 1))
    # Splits of a row are equally long, up to rounding.
    split_keys = tl.cdiv(tl.cdiv(num_keys, tl.maximum(num_splits, 1)), MIN_KEYS) * MIN_KEYS
    num_splits = tl.cdiv(num_keys, tl.maximum(split_keys, 1))
    first_item = tl.cumsum(num_splits) - num_splits
    num_places = tl.where(num_splits > 1, num_splits, 0)
    first_place = tl.cumsum(num_places) - num_places
    if tl.program_id(0) == 0:
        tl.store(row_ptr + row * 2, num_splits, is_row)
        tl.store(row_ptr + row * 2 + 1, first_place, is_row)

    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    split = item[:, None] - first_item[None, :]
    is_own = (split >= 0) & (split < num_splits[None, :])
    own_row = tl.max(tl.where(is_own, row[None, :], -1), axis=1)
    own_begin = first[None, :] + split * split_keys[None, :]
    own_end = tl.minimum(own_begin + split_keys[None, :], end[None, :])
    item_ptr += item * 8
    is_item = item < num_items
    tl.store(item_ptr, own_row, is_item)
    tl.store(item_ptr + 1, _own(is_own, own_begin), is_item)
    tl.store(item_ptr + 2, _own(is_own, own_end), is_item)
    tl.store(item_ptr + 3, _own(is_own, split), is_item)
    tl.store(item_ptr + 4, _own(is_own, (num_splits * 32 + num_queries)[None, :]), is_item)
    tl.store(item_ptr + 5, _own(is_own, first_place[None, :]), is_item)
    tl.store(item_ptr + 6, _own(is_own, query_start[None, :]), is_item)
    tl.store(item_ptr + 7, _own(is_own, (end - num_queries)[None, :]), is_item)


@triton.jit
def _own(is_own, of_rows):
    """Of each item, what is true of its row."""
    return tl.sum(tl.where(is_own, of_rows, 0), axis=1)
