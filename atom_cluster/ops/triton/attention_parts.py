"""Shares the keys of a step's short rows out to programs that read block after block, whatever rows they are of.

Where there are as many programs as rows, each row has some of its own; else all blocks are cut into equal parts. On the
device: the host does not know how long rows are. Knows no heads and no kernel that reads keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import room_for, varying

PART_FIELDS = 32
"""All that a program has to know to begin, in one line of memory; blocks are counted over all rows. Row of its first
block, that block, block behind its last, the row's first block, token, number of queries and number of entries, the
first part that has blocks of the row and how many have, how many have blocks of the last block's row, nothing twice,
and pages of the first `LISTED_UNITS` units of keys."""

FIRST_LISTED = 12
LISTED_UNITS = PART_FIELDS - FIRST_LISTED

_PARTS_PER_PROGRAM = 4


def schedule_parts(
    metadata: AttentionMetadata, *, num_rows: int, num_parts: int, block: int, unit: int, min_blocks: int
) -> torch.Tensor:
    """Cut the first `num_rows` rows' keys, in blocks of `block`, into `num_parts` parts or fewer: [parts, 32] int32.

    A row's blocks begin at the last multiple of `unit` that is no later than its first key; pages hold whole units. A
    part has `min_blocks` blocks or more, unless its row or all rows have less. See `PART_FIELDS`.
    """
    item_P32 = torch.empty(num_parts, PART_FIELDS, dtype=torch.int32, device=metadata.context_len.device)
    _parts_kernel[(triton.cdiv(num_parts, _PARTS_PER_PROGRAM),)](
        metadata.query_start,
        metadata.context_len,
        metadata.block_table,
        item_P32,
        num_rows,
        num_parts,
        metadata.block_table.stride(0),
        MIN_BLOCKS=min_blocks,
        KEYS=block,
        UNIT=unit,
        BLOCK_SIZE=metadata.block_size,
        WINDOW=metadata.window or 0,
        ROW_BLOCK=room_for(num_rows),
        PARTS=_PARTS_PER_PROGRAM,
        FIELDS=PART_FIELDS,
        FIRST_LISTED=FIRST_LISTED,
        num_warps=4,
        **launch_options(),
    )
    return item_P32


@triton.jit(**varying("query_start_ptr", "context_len_ptr", "num_rows", "num_parts", "table_stride"))
def _parts_kernel(
    query_start_ptr,
    context_len_ptr,
    table_ptr,
    item_ptr,
    num_rows,
    num_parts,
    table_stride,
    MIN_BLOCKS: tl.constexpr,
    KEYS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    FIELDS: tl.constexpr,
    FIRST_LISTED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: some parts. Every program works all rows out."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    row = tl.arange(0, ROW_BLOCK)
    is_row = row < num_rows
    length = tl.load(context_len_ptr + row, is_row, other=0)
    token = tl.load(query_start_ptr + row, is_row, other=0)
    num_queries = tl.load(query_start_ptr + row + 1, is_row, other=0) - token
    first = tl.zeros([ROW_BLOCK], tl.int32)
    if WINDOW > 0:
        first = tl.maximum(length - num_queries - WINDOW + 1, 0) // UNIT * UNIT
    num_blocks = tl.where(num_queries > 0, tl.cdiv(length - first, KEYS), 0)
    row_end = tl.cumsum(num_blocks)
    row_begin = row_end - num_blocks
    total = tl.maximum(tl.sum(num_blocks), 1)

    # Parts of rows by themselves: putting two pieces together takes longer than reading some blocks more.
    whole_blocks = 2 * MIN_BLOCKS + 1
    worth = tl.minimum((num_blocks.to(tl.int64) * num_parts // total).to(tl.int32), num_blocks // MIN_BLOCKS)
    worth = tl.where(num_blocks > whole_blocks, tl.maximum(worth, 1), tl.minimum(num_blocks, 1))
    longest = tl.max(tl.cdiv(num_blocks, tl.maximum(worth, 1)))
    is_apart = (tl.sum(worth) <= num_parts) & (longest <= tl.maximum(tl.cdiv(total, num_parts) + 1, whole_blocks))
    first_of_row = tl.cumsum(worth) - worth

    # Parts of all blocks.
    used = tl.minimum(num_parts, tl.maximum(total // MIN_BLOCKS, 1))
    first_part = tl.where(is_apart, first_of_row, _part_of(row_begin, used, total))
    num_pieces = tl.where(is_apart, worth, _part_of(row_end - 1, used, total) - first_part + 1)

    part = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    turn = part[:, None] - first_of_row[None, :]
    is_turn = (turn >= 0) & (turn < worth[None, :])
    divisor = tl.maximum(worth, 1)[None, :]
    turn_begin = row_begin[None, :] + turn * num_blocks[None, :] // divisor
    turn_end = row_begin[None, :] + (turn + 1) * num_blocks[None, :] // divisor
    begin = (part.to(tl.int64) * total // used).to(tl.int32)
    end = ((part + 1).to(tl.int64) * total // used).to(tl.int32)
    end = tl.where(part < used, end, begin)
    begin = tl.where(is_apart, _own(is_turn, turn_begin), begin)
    end = tl.where(is_apart, _own(is_turn, turn_end), end)

    is_own = (row_begin[None, :] <= begin[:, None]) & (begin[:, None] < row_end[None, :])
    is_last = (row_begin[None, :] <= end[:, None] - 1) & (end[:, None] - 1 < row_end[None, :])
    own_row = _own(is_own, row[None, :])
    own_begin = _own(is_own, row_begin[None, :])
    own_length = _own(is_own, length[None, :])
    start = _own(is_own, first[None, :]) + (begin - own_begin) * KEYS
    item_ptr += part * FIELDS
    is_part = part < num_parts
    tl.store(item_ptr, own_row, is_part)
    tl.store(item_ptr + 1, begin, is_part)
    tl.store(item_ptr + 2, end, is_part)
    tl.store(item_ptr + 3, own_begin, is_part)
    tl.store(item_ptr + 4, _own(is_own, token[None, :]), is_part)
    tl.store(item_ptr + 5, _own(is_own, num_queries[None, :]), is_part)
    tl.store(item_ptr + 6, own_length, is_part)
    tl.store(item_ptr + 7, _own(is_own, first_part[None, :]), is_part)
    tl.store(item_ptr + 8, _own(is_own, num_pieces[None, :]), is_part)
    tl.store(item_ptr + 9, _own(is_last, num_pieces[None, :]), is_part)

    field = tl.arange(0, FIELDS)[None, :]
    position = start[:, None] + (field - FIRST_LISTED) * UNIT
    is_listed = (field >= FIRST_LISTED) & is_part[:, None]
    page = tl.load(
        table_ptr + own_row.to(tl.int64)[:, None] * table_stride + position // BLOCK_SIZE,
        is_listed & (begin < end)[:, None] & (position < own_length[:, None]),
        other=0,
    )
    tl.store(item_ptr[:, None] + field, page, is_listed)


@triton.jit
def _part_of(block, num_parts, total):
    """Which of equal parts has a block."""
    return (((block + 1).to(tl.int64) * num_parts - 1) // total).to(tl.int32)


@triton.jit
def _own(is_own, of_rows):
    """Of each part, what is true of its row."""
    return tl.sum(tl.where(is_own, of_rows, 0), axis=1)
