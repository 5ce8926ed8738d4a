"""Placing a step's tokens by plain indexing."""

from __future__ import annotations

import torch

from atom_cluster.ops.step_inputs import PlacedTokens, RowTables, StepRows


def place_tokens(rows: StepRows, tables: RowTables, block_tables: tuple[torch.Tensor, ...]) -> PlacedTokens:
    """See `ops.step_inputs.PlaceTokens`."""
    start_R = torch.where(rows.start < 0, tables.num_known[rows.row] - 1, rows.start)
    query_start = rows.query_start.to(torch.int64)
    token_T = torch.arange(rows.num_tokens, device=start_R.device)
    step_T = torch.searchsorted(query_start[1:], token_T, right=True)
    token_row, position = rows.row[step_T], start_R[step_T] + token_T - query_start[step_T]
    column, offset = position // tables.block_size, position % tables.block_size
    for pages, block_table in zip(tables.pages, block_tables):
        torch.index_select(pages[:, : block_table.shape[1]], 0, rows.row, out=block_table)
    return PlacedTokens(
        token_ids=tables.tokens[token_row, position].to(torch.int64),
        positions=position,
        token_row=token_row,
        context_len=(start_R + query_start.diff()).to(torch.int32),
        slots=tuple(pages[token_row, column].to(torch.int64) * tables.block_size + offset for pages in tables.pages),
    )
