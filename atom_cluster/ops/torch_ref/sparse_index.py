"""Reference sparse index: row by row, in tiles of queries. Any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.sparse_index import IndexPlan
from atom_cluster.ops.torch_ref.paged import PagedRows

MAX_TILE_SCORES = 1 << 24
"""Scores of single heads that one tile computes at most, unless a single query has more; bounds memory."""


class RowByRowIndex:
    """Selection of one step."""

    def __init__(self, metadata: AttentionMetadata, tokens_per_entry: int) -> None:
        self._rows = PagedRows(metadata, tokens_per_entry)

    def store(self, key_TD: torch.Tensor, kv: KvLayerCache) -> None:
        """Write the step's index keys to their slots."""
        self._rows.store(key_TD, kv)

    def select(
        self, query_TJD: torch.Tensor, weight_TJ: torch.Tensor, kv: KvLayerCache, *, num_selected: int
    ) -> torch.Tensor | None:
        """Of each token's visible positions, the best."""
        if max(self._rows.num_entries) <= num_selected:
            return None
        selected_TK = torch.full((len(query_TJD), num_selected), -1, dtype=torch.int32, device=query_TJD.device)
        for row, tokens in enumerate(self._rows.tokens):
            num_queries, num_entries = tokens.stop - tokens.start, self._rows.num_entries[row]
            if num_entries <= num_selected:
                _write_positions(self._rows.visible(row), selected_TK[tokens])
                continue
            key_CD = self._rows.gather(row, kv, weight_TJ.dtype)
            size = max(1, MAX_TILE_SCORES // (num_entries * query_TJD.shape[1]))
            for start in range(0, num_queries, size):
                tile = slice(start, min(start + size, num_queries))
                query_QJD, weight_QJ = query_TJD[tokens][tile].to(weight_TJ.dtype), weight_TJ[tokens][tile]
                scores_QC = _scores(query_QJD, weight_QJ, key_CD)
                is_chosen_QC = _best(scores_QC, self._rows.visible(row, tile), num_selected)
                _write_positions(is_chosen_QC, selected_TK[tokens][tile])
        return selected_TK


def plan_index(metadata: AttentionMetadata, *, tokens_per_entry: int = 1) -> IndexPlan:
    """The plan of one step."""
    return RowByRowIndex(metadata, tokens_per_entry)


def _scores(query_QJD: torch.Tensor, weight_QJ: torch.Tensor, key_CD: torch.Tensor) -> torch.Tensor:
    """[Q, C]"""
    products_QJC = torch.matmul(query_QJD, key_CD.T).relu_()
    return torch.matmul(weight_QJ[:, None], products_QJC)[:, 0]


def _best(scores_QC: torch.Tensor, is_visible_QC: torch.Tensor, num_selected: int) -> torch.Tensor:
    """Whether each position is among the best of those visible, [Q, C] bool; earlier ones win ties."""
    scores_QC = scores_QC.masked_fill(~is_visible_QC, float("-inf"))
    last_Q1 = scores_QC.topk(num_selected, dim=-1).values[:, -1:]
    is_better, is_last = scores_QC > last_Q1, scores_QC == last_Q1
    num_left_Q1 = num_selected - is_better.sum(-1, keepdim=True)
    return (is_better | (is_last & (is_last.cumsum(-1) <= num_left_Q1))) & is_visible_QC


def _write_positions(is_chosen_QC: torch.Tensor, out_QK: torch.Tensor) -> None:
    """Positions of the chosen, from the left; the rest of `out_QK` is kept."""
    num_selected = out_QK.shape[1]
    # What is not chosen goes to a column behind the last, so that nothing waits for the device to count.
    column_QC = (is_chosen_QC.cumsum(-1) - 1).masked_fill(~is_chosen_QC, num_selected)
    position_C = torch.arange(is_chosen_QC.shape[1], dtype=out_QK.dtype, device=out_QK.device)
    wide_QK = F.pad(out_QK, (0, 1))
    out_QK.copy_(wide_QK.scatter_(1, column_QC, position_C.expand_as(column_QC))[:, :num_selected])
