"""The index of sparse attention: small keys and queries that choose which cached tokens attention looks at.

Replicated: every rank of a gang chooses the same. Knows no attention and no models.
Shape suffixes: T tokens, M hidden dims, Q dims of a token's latent query, J index heads, D index head dims, K selected
positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from atom_cluster.kv_cache.layout import KvLayerLayout
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.linear import ColumnLinear, Output
from atom_cluster.layers.module import CachingModule
from atom_cluster.layers.norm import LayerNorm
from atom_cluster.layers.rotary import RotaryTable
from atom_cluster.ops.attention import Rotation
from atom_cluster.quantization.unquantized import NOTHING_QUANTIZED


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerSpec:
    """Sizes and options."""

    hidden_size: int
    query_rank: int
    """Dims of the latent queries."""
    num_heads: int
    head_dim: int
    num_selected: int
    """Positions that a token attends to at most."""
    is_rope_interleaved: bool
    """The leading dims of a head are rotated in pairs of neighbours, not of halves."""
    norm_eps: float = 1e-6


class Indexer(CachingModule):
    """Scores cached tokens for each token of a step, and selects the best."""

    def __init__(self, context: LayerContext, spec: IndexerSpec, rotary: RotaryTable) -> None:
        self.query = ColumnLinear(
            context, num_in=spec.query_rank, outputs=[Output("wq_b", spec.num_heads * spec.head_dim)]
        )
        self.key = ColumnLinear(context, num_in=spec.hidden_size, outputs=[Output("wk", spec.head_dim)])
        self.key_norm = LayerNorm(context.at("k_norm"), size=spec.head_dim, eps=spec.norm_eps)
        # Checkpoints keep the heads' weights in full precision whatever the rest is quantized to.
        self._wide = torch.promote_types(context.dtype, torch.float32)
        self.weights = ColumnLinear(
            replace(context, dtype=self._wide, quantization=NOTHING_QUANTIZED),
            num_in=spec.hidden_size,
            outputs=[Output("weights_proj", spec.num_heads)],
        )
        self.cache_layout = KvLayerLayout(num_kv_heads=1, key_dim=spec.head_dim, value_dim=0, dtype=context.cache_dtype)
        self._spec = spec
        self._ops = context.ops
        self._rotary = rotary
        self._scale = (spec.num_heads * spec.head_dim) ** -0.5

    def __call__(self, x_TM: torch.Tensor, latent_query_TQ: torch.Tensor, inputs: LayerInputs) -> torch.Tensor | None:
        """Selected positions as `ops.sparse_index` has them, [T, K] or None; writes the step's keys into the cache."""
        plan = inputs.mixer("index", lambda inputs: inputs.ops.plan_index(inputs.batch.attention[None]))
        query_TJD = self.query(latent_query_TQ).view(len(x_TM), -1, self._spec.head_dim)
        key_T1D = self.key_norm(self.key(x_TM))[:, None]
        rotation = inputs.once((Rotation, self._rotary), lambda: Rotation(*self._rotary.at(inputs.batch.positions)))
        query_TJD, key_T1D = self._ops.rotary(
            query_TJD, key_T1D, rotation.cos_T1P, rotation.sin_T1P, is_interleaved=self._spec.is_rope_interleaved
        )
        kv = inputs.kv(self.cache_index)
        plan.store(key_T1D[:, 0], kv)
        weight_TJ = self.weights(x_TM.to(self._wide)) * self._scale
        return plan.select(query_TJD, weight_TJ, kv, num_selected=self._spec.num_selected)
