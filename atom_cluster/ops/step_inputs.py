"""Contract of placing a step's tokens: which tokens they are, at which positions, in which slots of KV memory.

Where a row's newest token is may be known on the device alone, so everything that follows from it is worked out there.
Knows no requests and no scheduling.

Shape suffixes: N rows of the tables, R rows of the step, T tokens of the step, C columns of a table of pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """What a step computes."""

    row: torch.Tensor
    """[R] int64: index into N of each row."""
    start: torch.Tensor
    """[R] int64: position of its first token; -1: that of its newest token, the last one known."""
    query_start: torch.Tensor
    """[R + 1] int32: tokens of row r are query_start[r]:query_start[r + 1]."""
    num_tokens: int
    """T"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTables:
    """What all rows have."""

    tokens: torch.Tensor
    """[N, positions] int32: known tokens, and drafts behind them."""
    num_known: torch.Tensor
    """[N] int64: known tokens."""
    pages: tuple[torch.Tensor, ...]
    """Per group of pages, [N, C] int32: column i has the page of the row's i-th block of positions."""
    block_size: int
    """Tokens per page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedTokens:
    """Where a step's tokens are."""

    token_ids: torch.Tensor
    """[T] int64"""
    positions: torch.Tensor
    """[T] int64"""
    token_row: torch.Tensor
    """[T] int64: index into N."""
    context_len: torch.Tensor
    """[R] int32: the position behind the row's last token of the step."""
    slots: tuple[torch.Tensor, ...]
    """Per group, [T] int64: page * block_size + offset."""


class PlaceTokens(Protocol):
    """Places the tokens of one step."""

    def __call__(self, rows: StepRows, tables: RowTables, block_tables: tuple[torch.Tensor, ...]) -> PlacedTokens:
        """Also writes `block_tables`, per group [R, C'] int32 with C' <= C: the first columns of each row's pages, as
        many of them as the row's context has; what is behind is left as it was, or also written."""
        ...
