"""Grouped-query attention over paged KV, its heads split over the ranks. Knows no models and no block tables.

Shape suffixes: T tokens, M hidden dims, H query heads and K key/value heads of this rank, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.linear import ColumnLinear, Outputs, RowLinear
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.ops.attention import AttentionPlan, KvLayerCache
from atom_cluster.parallel.sharding import WeightPart, even_span, kv_head_span


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Sizes over all ranks, and options."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    qk_norm_eps: float | None = None
    """None: query and key heads are not normalised."""


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What the attention layers of one step share."""

    plan: AttentionPlan
    cos: torch.Tensor
    """[T, 1, P], as `ops.rotary` takes it."""
    sin: torch.Tensor
    """[T, 1, P], as `ops.rotary` takes it."""


class Attention:
    """Self-attention with rotary positions."""

    def __init__(self, context: LayerContext, spec: AttentionSpec) -> None:
        group = context.groups.tensor
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        query_span = even_span(query_size, group, what="attention heads", unit=spec.head_dim)
        kv_span = kv_head_span(spec.num_kv_heads, spec.head_dim, group)
        kv_outputs = Outputs(kv_size, kv_span)
        self.qkv = ColumnLinear(
            context,
            num_in=spec.hidden_size,
            outputs=(Outputs(query_size, query_span), kv_outputs, kv_outputs),
            has_bias=spec.has_qkv_bias,
        )
        self.output = RowLinear(
            context,
            full_in=query_size,
            in_span=query_span,
            num_out=spec.hidden_size,
            has_bias=spec.has_output_bias,
        )
        self._norms: tuple[RmsNorm, RmsNorm] | None = None
        if spec.qk_norm_eps is not None:
            size, eps = spec.head_dim, spec.qk_norm_eps
            self._norms = (RmsNorm(context, size=size, eps=eps), RmsNorm(context, size=size, eps=eps))
        self.num_kv_heads = kv_span.length // spec.head_dim
        """Heads on this rank."""
        self._ops = context.ops
        self._head_dim = spec.head_dim
        self._split = [query_span.length, kv_span.length, kv_span.length]
        self._scale = spec.head_dim**-0.5

    def weight_parts(self, name: str) -> dict[str, WeightPart]:
        """Where the checkpoint's tensors go, by their names."""
        parts = self.qkv.weight_parts((f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"))
        parts.update(self.output.weight_parts(f"{name}.o_proj"))
        if self._norms is not None:
            parts.update(self._norms[0].weight_parts(f"{name}.q_norm"))
            parts.update(self._norms[1].weight_parts(f"{name}.k_norm"))
        return parts

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend."""
        self.qkv.finish_loading()
        self.output.finish_loading()

    def __call__(self, x_TM: torch.Tensor, inputs: AttentionInputs, kv: KvLayerCache) -> torch.Tensor:
        """[T, M] -> [T, M]; writes the step's KV into `kv`."""
        heads = (x_TM.shape[0], -1, self._head_dim)
        query, key, value = torch.split(self.qkv(x_TM), self._split, dim=-1)
        query_THD, key_TKD, value_TKD = query.view(heads), key.view(heads), value.view(heads)
        if self._norms is not None:
            query_THD, key_TKD = self._norms[0](query_THD), self._norms[1](key_TKD)
        query_THD, key_TKD = self._ops.rotary(query_THD, key_TKD, inputs.cos, inputs.sin)
        inputs.plan.store(key_TKD, value_TKD, kv)
        output_THD = inputs.plan.attend(query_THD, kv, scale=self._scale)
        return self.output(output_THD.flatten(1))
