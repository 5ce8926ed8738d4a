"""Contract of compression: what groups of n tokens leave behind is pooled into one cached entry per group.

Each token has, for one or two series, a value and a gate of D dims each; both are cached for the last tokens of a row
(n of them for each series). With one series, entry e is, in each dim, the mean of the values of tokens e * n ..
e * n + n - 1, weighted by the softmax of gate plus bias over them. With two, the softmax is over 2 n slots: the first
series of group e - 1, of which group 0 has none, then the second series of group e. So an entry is complete with the
last token of its group, in the step that computes it, and then it is written. Knows no layers and no models.

Shape suffixes: T tokens of the step, C = D * series, S = n * series slots of an entry, N entries of the step.
"""

from __future__ import annotations

from typing import Protocol

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache


class CompressionPlan(Protocol):
    """Compression of one step, prepared once and used by every layer. Holds no reference to KV memory.

    Which N entries it computes is its own choice, as long as `store` writes those that the step's tokens complete. It
    may write others, of groups that are not complete, into their rows' pages.
    """

    @property
    def first_positions(self) -> torch.Tensor:
        """[N] int64: the position of the first token of each entry's group."""
        ...

    def pool(
        self, value_TC: torch.Tensor, gate_TC: torch.Tensor, bias_SD: torch.Tensor, inputs: KvLayerCache
    ) -> torch.Tensor:
        """Write the step's values and gates to their slots, [N', block_size, 1, C] each, and pool: entries [N, D].

        The softmax is computed in float32 or wider, which is the dtype of the bias and the result. Series lie side by
        side in C, and one after the other in S.
        """
        ...

    def store(self, entry_ND: torch.Tensor, entries: KvLayerCache) -> None:
        """Write entries to their places, `entries.key` [N', entries per page, 1, D]: see `KvLayerLayout`."""
        ...


class PlanCompression(Protocol):
    """Builds the plan of one step."""

    def __call__(
        self, tokens: AttentionMetadata, entries: AttentionMetadata, *, tokens_per_entry: int, num_series: int
    ) -> CompressionPlan:
        """Called once per forward pass. tokens: of the group that keeps values and gates, whose window is n * series.

        entries: of the group that keeps entries, without window.
        """
        ...
