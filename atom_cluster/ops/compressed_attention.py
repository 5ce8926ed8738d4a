"""Contract of attention over a window of tokens and, beyond it, compressed entries, in one softmax.

One key head, which is also the value head, is shared by all query heads. A token sees the tokens of its window, and of
the entries that stand for n tokens each (`ops.compression`) those that are complete with it: at position p, the first
(p + 1) // n, or of these the selected ones. Windows and entries may overlap. Knows no layers and no models.

Shape suffixes: T tokens of the step, H query heads of this rank, D head dim, K entries selected per token.
"""

from __future__ import annotations

from typing import Protocol

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache


class CompressedAttentionPlan(Protocol):
    """Attention of one step, prepared once and used by every layer. Holds no reference to KV memory."""

    def store(self, key_TD: torch.Tensor, tokens: KvLayerCache) -> None:
        """Write the step's keys to their slots: `tokens.key` [N, block_size, 1, D]."""
        ...

    def attend(
        self,
        query_THD: torch.Tensor,
        tokens: KvLayerCache,
        entries: KvLayerCache,
        *,
        scale: float,
        sink_H: torch.Tensor,
        selected_TK: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the step's queries over their rows' tokens and entries, which are stored already.

        Returns [T, H, D], contiguous, in the query's dtype. Scores and softmax are computed in float32 or wider.
        sink_H: as for `ops.attention`. selected_TK: what `ops.sparse_index` selected of the entries; None: all.
        """
        ...


class PlanCompressedAttention(Protocol):
    """Builds the plan of one step."""

    def __call__(
        self, tokens: AttentionMetadata, entries: AttentionMetadata, *, tokens_per_entry: int
    ) -> CompressedAttentionPlan:
        """Called once per forward pass. `tokens` has the window, `entries` has none."""
        ...
