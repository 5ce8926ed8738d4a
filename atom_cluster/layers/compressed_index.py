"""The index of sparse attention to compressed entries: small entries of its own, and queries that choose among them.

Replicated: every rank of a gang chooses the same. Knows no attention and no models.
Shape suffixes: T tokens, M hidden dims, Q dims of a token's latent query, J index heads, D index head dims, K selected
entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from atom_cluster.layers.compressor import Compressor, CompressorSpec
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.linear import ColumnLinear, Output
from atom_cluster.layers.module import Module
from atom_cluster.layers.rotary import RotaryTable, rotate_trailing


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedIndexSpec:
    """Sizes."""

    query_rank: int
    """Dims of the latent queries."""
    num_heads: int
    num_selected: int
    """Entries that a token attends to at most."""
    compressor: CompressorSpec
    """Of the index's entries."""


class CompressedIndex(Module):
    """Scores a row's entries for each token of a step, and selects the best."""

    def __init__(self, context: LayerContext, spec: CompressedIndexSpec, rotary: RotaryTable) -> None:
        hidden_size, head_dim = spec.compressor.hidden_size, spec.compressor.entry_dim
        self.query = ColumnLinear(context, num_in=spec.query_rank, outputs=[Output("wq_b", spec.num_heads * head_dim)])
        # Checkpoints keep the heads' weights in full precision whatever the rest is quantized to.
        self._wide = torch.promote_types(context.dtype, torch.float32)
        self.weights = ColumnLinear(
            replace(context.unquantized, dtype=self._wide),
            num_in=hidden_size,
            outputs=[Output("weights_proj", spec.num_heads)],
        )
        self.compressor = Compressor(context.at("compressor"), spec.compressor, rotary)
        self._spec = spec
        self._ops = context.ops
        self._rotary = rotary
        self._scale = (spec.num_heads * head_dim) ** -0.5

    def __call__(self, x_TM: torch.Tensor, latent_query_TQ: torch.Tensor, inputs: LayerInputs) -> torch.Tensor | None:
        """Selected entries as `ops.sparse_index` has them, [T, K] or None; writes the step's entries of the index."""
        tokens_per_entry = self._spec.compressor.tokens_per_entry
        plan = inputs.once(
            ("index", tokens_per_entry),
            lambda: self._ops.plan_index(inputs.batch.attention[None], tokens_per_entry=tokens_per_entry),
        )
        entries = self.compressor(x_TM, inputs)
        query_TJD = self.query(latent_query_TQ).view(len(x_TM), self._spec.num_heads, -1)
        cos, sin = inputs.once(self._rotary, lambda: self._rotary.at(inputs.batch.positions))
        query_TJD = rotate_trailing(self._ops.rotary, query_TJD, cos, sin)
        weight_TJ = self.weights(x_TM.to(self._wide)) * self._scale
        return plan.select(query_TJD, weight_TJ, entries, num_selected=self._spec.num_selected)
