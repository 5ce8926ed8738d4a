"""Contract of the sparse index: which cached tokens a query attends to, by scores of small keys of their own.

score(t, c) = sum over heads j of weight[t, j] * max(0, query[t, j] . key[c]). What is chosen may also be entries that
stand for several tokens each; then c, and each position below, counts entries. Knows no layers and no models.

Shape suffixes: T tokens of the step, J index heads, D dims of an index head, K positions selected per token.
"""

from __future__ import annotations

from typing import Protocol

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache


class IndexPlan(Protocol):
    """Selection of one step, prepared once and used by every layer. Holds no reference to KV memory."""

    def store(self, key_TD: torch.Tensor, kv: KvLayerCache) -> None:
        """Write the step's index keys to their slots: `kv.key` [N, block_size, 1, D]. Of entries, one per token."""
        ...

    def select(
        self, query_TJD: torch.Tensor, weight_TJ: torch.Tensor, kv: KvLayerCache, *, num_selected: int
    ) -> torch.Tensor | None:
        """[T, K] int32: of the positions 0..p that a token at p of its row sees, the K = `num_selected` best.

        It sees the entries that are complete with it: of n tokens per entry, the first (p + 1) // n.
        In any order, each once. A token that sees K or fewer selects all of them, and behind them -1 stands for what is
        missing. None when this is so for every token, as far as the host knows. Scores are computed in float32 or wider
        from `weight_TJ`, which has that dtype. Among equal scores earlier positions win, so that a token selects alike
        in any batch.
        """
        ...


class PlanIndex(Protocol):
    """Builds the plan of one step."""

    def __call__(self, metadata: AttentionMetadata, *, tokens_per_entry: int = 1) -> IndexPlan:
        """Called once per forward pass; does what all layers share. `metadata` has no window."""
        ...
