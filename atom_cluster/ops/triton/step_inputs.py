"""Placing a step's tokens: a program per row works out its tokens, and copies the part of its pages that it has."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.step_inputs import PlacedTokens, RowTables, StepRows
from atom_cluster.ops.triton.runtime import varying

_TOKENS_AT_ONCE = (1, 16, 512)
"""Of rows that decode, that verify drafts, and that have prompts."""
_COLUMNS_AT_ONCE = 128


def place_tokens(rows: StepRows, tables: RowTables, block_tables: tuple[torch.Tensor, ...]) -> PlacedTokens:
    """See `ops.step_inputs.PlaceTokens`. One launch per group of pages."""
    num_rows = rows.row.shape[0]
    # Each begins at a multiple of 16 bytes.
    padded = rows.num_tokens + rows.num_tokens % 2
    token_ids, positions, token_row = rows.row.new_empty(3, padded)[:, : rows.num_tokens].unbind(0)
    context_len = rows.query_start.new_empty(num_rows)
    slots = tuple(torch.empty_like(positions) for _ in tables.pages)
    per_row = triton.cdiv(rows.num_tokens, num_rows)
    tokens_at_once = next(size for size in _TOKENS_AT_ONCE if per_row <= size or size == _TOKENS_AT_ONCE[-1])
    for index, (pages, block_table) in enumerate(zip(tables.pages, block_tables)):
        _place_kernel[(num_rows,)](
            rows.row,
            rows.start,
            rows.query_start,
            tables.num_known,
            tables.tokens,
            tables.tokens.stride(0),
            pages,
            pages.stride(0),
            block_table,
            block_table.stride(0),
            block_table.shape[1],
            token_ids,
            positions,
            token_row,
            context_len,
            slots[index],
            BLOCK_SIZE=tables.block_size,
            WRITES_TOKENS=index == 0,
            TOKENS=tokens_at_once,
            COLUMNS=_COLUMNS_AT_ONCE,
            num_warps=4,
        )
    return PlacedTokens(
        token_ids=token_ids, positions=positions, token_row=token_row, context_len=context_len, slots=slots
    )


@triton.jit(
    **varying(
        "row_ptr",
        "start_ptr",
        "query_start_ptr",
        "block_table_stride",
        "num_columns",
        "token_ids_ptr",
        "positions_ptr",
        "token_row_ptr",
        "context_len_ptr",
        "slot_ptr",
    )
)
def _place_kernel(
    row_ptr,
    start_ptr,
    query_start_ptr,
    num_known_ptr,
    tokens_ptr,
    tokens_stride,
    pages_ptr,
    pages_stride,
    block_table_ptr,
    block_table_stride,
    num_columns,
    token_ids_ptr,
    positions_ptr,
    token_row_ptr,
    context_len_ptr,
    slot_ptr,
    BLOCK_SIZE: tl.constexpr,
    WRITES_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    step = tl.program_id(0)
    row = tl.load(row_ptr + step)
    first = tl.load(query_start_ptr + step)
    end = tl.load(query_start_ptr + step + 1)
    start = tl.load(start_ptr + step)
    if start < 0:
        start = tl.load(num_known_ptr + row) - 1
    context_len = start + end - first
    for begin in range(first, end, TOKENS):
        token = begin + tl.arange(0, TOKENS)
        is_inside = token < end
        position = start + token - first
        page = tl.load(pages_ptr + row * pages_stride + position // BLOCK_SIZE, is_inside, other=0).to(tl.int64)
        tl.store(slot_ptr + token, page * BLOCK_SIZE + position % BLOCK_SIZE, is_inside)
        if WRITES_TOKENS:
            token_id = tl.load(tokens_ptr + row * tokens_stride + position, is_inside, other=0)
            tl.store(token_ids_ptr + token, token_id.to(tl.int64), is_inside)
            tl.store(positions_ptr + token, position, is_inside)
            tl.store(token_row_ptr + token, tl.zeros([TOKENS], tl.int64) + row, is_inside)
    if WRITES_TOKENS:
        tl.store(context_len_ptr + step, context_len.to(tl.int32))
    num_pages = tl.minimum((context_len + BLOCK_SIZE - 1) // BLOCK_SIZE, num_columns).to(tl.int32)
    for begin in range(0, num_pages, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        is_inside = column < num_pages
        page = tl.load(pages_ptr + row * pages_stride + column, is_inside, other=0)
        tl.store(block_table_ptr + step.to(tl.int64) * block_table_stride + column, page, is_inside)
