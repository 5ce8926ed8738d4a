"""The sparse index on GPUs: all scores of some tokens, then the best of each. Knows no layers."""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.sparse_index import IndexPlan
from atom_cluster.ops.triton.mla_schedule import see_entries
from atom_cluster.ops.triton.paged_store import store_entries
from atom_cluster.ops.triton.sparse_scores import index_scores
from atom_cluster.ops.triton.sparse_select import select_best
from atom_cluster.units import align_up

MAX_SCORES = 1 << 25
"""Scores that are kept at once, unless a single token has more; bounds memory."""


class PagedIndex:
    """Selection of one step."""

    def __init__(self, metadata: AttentionMetadata, tokens_per_entry: int) -> None:
        self._metadata, self._tokens_per_entry = metadata, tokens_per_entry
        self._max_entries = max(metadata.context_len_cpu) // tokens_per_entry
        self._seen_T, self._row_T = see_entries(metadata, tokens_per_entry=tokens_per_entry)

    def store(self, key_TD: torch.Tensor, kv: KvLayerCache) -> None:
        """Write the step's index keys to their slots."""
        store_entries(key_TD, kv, self._metadata.slot, block_size=self._metadata.block_size)

    def select(
        self, query_TJD: torch.Tensor, weight_TJ: torch.Tensor, kv: KvLayerCache, *, num_selected: int
    ) -> torch.Tensor | None:
        """Of each token's visible positions, the best."""
        if self._max_entries <= num_selected:
            return None
        num_tokens, device = len(query_TJD), query_TJD.device
        selected_TK = torch.empty(num_tokens, num_selected, dtype=torch.int32, device=device)
        width = align_up(self._max_entries, 16)
        size = min(num_tokens, max(1, MAX_SCORES // width))
        score_TC = torch.empty(size, width, dtype=torch.float32, device=device)
        for first in range(0, num_tokens, size):
            tokens = slice(first, min(first + size, num_tokens))
            index_scores(
                query_TJD[tokens],
                weight_TJ[tokens],
                kv,
                self._metadata.block_table,
                self._row_T[tokens],
                self._seen_T[tokens],
                score_TC,
                block_size=self._metadata.block_size,
                tokens_per_entry=self._tokens_per_entry,
                num_skipped=num_selected,
            )
            select_best(score_TC, self._seen_T[tokens], selected_TK[tokens])
        return selected_TK


def plan_index(metadata: AttentionMetadata, *, tokens_per_entry: int = 1) -> IndexPlan:
    """The plan of one step."""
    return PagedIndex(metadata, tokens_per_entry)
