"""Verification of drafts and the writing of drawn tokens, one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.sampling import DrawnRows
from atom_cluster.ops.step_inputs import RowTables
from atom_cluster.ops.triton.runtime import varying


def accept(token_ids_P: torch.Tensor, rows: DrawnRows, tables: RowTables) -> torch.Tensor:
    """See `ops.sampling.AcceptTokens`."""
    num_kept_S = torch.empty_like(rows.row)
    if len(rows.row):
        _accept_kernel[(len(rows.row),)](
            token_ids_P,
            rows.row,
            rows.first_sample,
            rows.newest_position,
            rows.num_drafts,
            tables.tokens,
            tables.tokens.stride(0),
            tables.num_known,
            num_kept_S,
            rows.padding_row,
            SAMPLES=triton.next_power_of_2(rows.max_drafts + 1),
            num_warps=1,
        )
    return num_kept_S


@triton.jit(**varying("row_ptr", "first_sample_ptr", "newest_position_ptr", "num_drafts_ptr"))
def _accept_kernel(
    drawn_ptr,
    row_ptr,
    first_sample_ptr,
    newest_position_ptr,
    num_drafts_ptr,
    tokens_ptr,
    tokens_stride,
    num_known_ptr,
    num_kept_ptr,
    padding_row,
    SAMPLES: tl.constexpr,
):
    i = tl.program_id(0)
    row = tl.load(row_ptr + i)
    newest_position = tl.load(newest_position_ptr + i)
    num_drafts = tl.load(num_drafts_ptr + i)
    index = tl.arange(0, SAMPLES)
    row_tokens_ptr = tokens_ptr + row * tokens_stride + newest_position + 1 + index
    drawn = tl.load(drawn_ptr + tl.load(first_sample_ptr + i) + index, index <= num_drafts, other=0)
    draft = tl.load(row_tokens_ptr, index < num_drafts, other=-1).to(tl.int64)
    is_right = (drawn == draft) & (index < num_drafts)
    num_kept = tl.min(tl.where(is_right, SAMPLES, index)).to(tl.int64)
    tl.store(num_kept_ptr + i, num_kept)
    if row != padding_row:
        tl.store(row_tokens_ptr, drawn.to(tl.int32), index <= num_drafts)
        tl.store(num_known_ptr + row, newest_position + num_kept + 2)
