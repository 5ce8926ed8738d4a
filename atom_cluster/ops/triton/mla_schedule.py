"""Counts, on the device, the blocks of cached latents that rows or tokens of a step attend to. Knows no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.runtime import room_for, varying


@dataclass(frozen=True, slots=True)
class Blocks:
    """Consecutive rows and how many blocks each has. Of sparse attention every token is a row here."""

    num_rows: int
    max_tokens: int
    """Tokens of the step that a row has at most."""
    query_start: torch.Tensor
    """[rows + 1] int32; not of sparse attention."""
    length: torch.Tensor
    """[rows] int32: entries that the row's last token attends to."""
    block_start: torch.Tensor
    """[rows + 1] int32: blocks of all rows before."""
    block_table: torch.Tensor
    table_row: torch.Tensor
    """[rows] int32: whose line of the block table; of sparse attention only, elsewhere it is the row itself."""
    min_per_part: int
    """Blocks that are worth a program of their own."""

    def num_parts(self, num_tiles: int) -> int:
        """Programs for each of `num_tiles` tiles of queries, so that the chip is filled about once."""
        return max(1, runtime.num_multiprocessors(self.length.device) // num_tiles)


def count_row_blocks(metadata: AttentionMetadata, rows: slice, *, size: int, min_per_part: int) -> Blocks:
    """Of some rows, in blocks of `size` tokens."""
    starts = metadata.query_start_cpu[rows.start : rows.stop + 1]
    num_rows = rows.stop - rows.start
    length = metadata.context_len[rows]
    block_start = torch.empty(num_rows + 1, dtype=torch.int32, device=length.device)
    _count_kernel[(1,)](
        length, block_start, num_rows, SIZE=size, ROW_BLOCK=_row_block(num_rows), num_warps=_count_warps(num_rows)
    )
    return Blocks(
        num_rows=num_rows,
        max_tokens=max(end - start for start, end in zip(starts, starts[1:])),
        query_start=metadata.query_start[rows.start : rows.stop + 1],
        length=length,
        block_start=block_start,
        block_table=metadata.block_table[rows],
        table_row=length,
        min_per_part=min_per_part,
    )


def count_token_blocks(metadata: AttentionMetadata, *, limit: int, size: int, min_per_part: int) -> Blocks:
    """Of all tokens, each of which attends to what it sees but at most `limit` of it, in blocks of `size`."""
    num_tokens = metadata.query_start_cpu[-1]
    length, table_row = see_entries(metadata, limit=limit)
    block_start = torch.empty(num_tokens + 1, dtype=torch.int32, device=length.device)
    _count_kernel[(1,)](
        length, block_start, num_tokens, SIZE=size, ROW_BLOCK=_row_block(num_tokens), num_warps=_count_warps(num_tokens)
    )
    return Blocks(
        num_rows=num_tokens,
        max_tokens=1,
        query_start=metadata.query_start,
        length=length,
        block_start=block_start,
        block_table=metadata.block_table,
        table_row=table_row,
        min_per_part=min_per_part,
    )


def see_entries(
    metadata: AttentionMetadata, *, limit: int = 1 << 30, tokens_per_entry: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many entries each token of the step sees, at most `limit`, and each token's row: [T] int32 both."""
    num_rows, num_tokens = len(metadata.query_start_cpu) - 1, metadata.query_start_cpu[-1]
    seen_T, row_T = torch.empty(2, num_tokens, dtype=torch.int32, device=metadata.context_len.device)
    if num_tokens:
        _see_kernel[(triton.cdiv(num_tokens, _SEE_TOKENS),)](
            metadata.query_start,
            metadata.context_len,
            seen_T,
            row_T,
            num_rows,
            num_tokens,
            limit,
            TOKENS_PER_ENTRY=tokens_per_entry,
            TOKENS=_SEE_TOKENS,
            num_warps=4,
        )
    return seen_T, row_T


_SEE_TOKENS = 128


def _row_block(num_rows: int) -> int:
    return min(2048, room_for(num_rows))


def _count_warps(num_rows: int) -> int:
    return 4 if num_rows <= 512 else 8


@triton.jit(**varying("length_ptr", "block_start_ptr", "num_rows"))
def _count_kernel(length_ptr, block_start_ptr, num_rows, SIZE: tl.constexpr, ROW_BLOCK: tl.constexpr):
    """One program: running sums of the rows' blocks."""
    total = 0
    for first in range(0, num_rows, ROW_BLOCK):
        row = first + tl.arange(0, ROW_BLOCK)
        blocks = tl.cdiv(tl.load(length_ptr + row, row < num_rows, other=0), SIZE)
        tl.store(block_start_ptr + row, total + tl.cumsum(blocks, axis=0) - blocks, row < num_rows)
        total += tl.sum(blocks, axis=0)
    tl.store(block_start_ptr + num_rows, total)


@triton.jit(**varying("query_start_ptr", "context_len_ptr", "length_ptr", "table_row_ptr", "num_rows", "num_tokens"))
def _see_kernel(
    query_start_ptr,
    context_len_ptr,
    length_ptr,
    table_row_ptr,
    num_rows,
    num_tokens,
    limit,
    TOKENS_PER_ENTRY: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: the rows of some tokens, found by bisection, and how many entries they attend to."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    low = tl.zeros([TOKENS], tl.int32)
    high = low + num_rows
    width = num_rows
    while width > 0:
        middle = (low + high) // 2
        is_behind = tl.load(query_start_ptr + middle + 1, is_token & (middle < num_rows), other=0x7FFFFFFF) <= token
        low = tl.where(is_behind, middle + 1, low)
        high = tl.where(is_behind, high, middle)
        width = width // 2
    end = tl.load(query_start_ptr + low + 1, is_token, other=0)
    context_len = tl.load(context_len_ptr + low, is_token, other=0)
    seen = (context_len - end + token + 1) // TOKENS_PER_ENTRY
    tl.store(length_ptr + token, tl.minimum(seen, limit), is_token)
    tl.store(table_row_ptr + token, low, is_token)
