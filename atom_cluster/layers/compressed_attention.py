"""Attention to a window of tokens and to compressed entries of all before, its query heads split over the ranks.

There is one key head, which is also the value head and is computed and cached on every rank. As values carry their
position, in the last dims of a head, the output is turned back by the position of the query. Knows no models and no
block tables. Shape suffixes: T tokens, M hidden dims, Q dims of the latent query, H query heads of this rank, D head
dim, G groups of heads of this rank, I inputs and R outputs of a group's output projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from atom_cluster.kv_cache.layout import KvLayerLayout
from atom_cluster.layers.compressed_index import CompressedIndex, CompressedIndexSpec
from atom_cluster.layers.compressor import Compressor, CompressorSpec
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.linear import ColumnLinear, DequantizedLinear, Output, RowLinear
from atom_cluster.layers.module import CachingModule
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.layers.rotary import RotaryTable, rotate_trailing
from atom_cluster.ops.compressed_attention import CompressedAttentionPlan
from atom_cluster.parallel.sharding import Span, WeightPart, WeightParts, even_span


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedAttentionSpec:
    """Sizes over all ranks, and options."""

    hidden_size: int
    num_heads: int
    head_dim: int
    query_rank: int
    """Dims of the latent that queries are projections of."""
    window: int
    """Positions that a token sees, its own included, beside entries."""
    num_output_groups: int
    """Groups of heads that have an output projection of their own, before the common one."""
    output_rank: int
    """Outputs of each of these."""
    norm_eps: float
    compressor: CompressorSpec | None
    """None: tokens see the window alone."""
    index: CompressedIndexSpec | None
    """None: they see all entries."""


class CompressedAttention(CachingModule):
    """Self-attention over a window and compressed entries."""

    def __init__(
        self, context: LayerContext, spec: CompressedAttentionSpec, rotary: RotaryTable, *, key_norm_name: str
    ) -> None:
        """rotary: of the last dims of heads, and of entries."""
        group = context.groups.tensor
        heads = even_span(spec.num_heads, group, what="attention heads")
        self.down = _down_projections(context, spec)
        self.query_norm = RmsNorm(context.at("q_norm"), size=spec.query_rank, eps=spec.norm_eps, is_wide=True)
        self.key_norm = RmsNorm(context.at(key_norm_name), size=spec.head_dim, eps=spec.norm_eps, is_wide=True)
        query_span = Span(heads.start * spec.head_dim, heads.length * spec.head_dim)
        query_up = Output("wq_b", spec.num_heads * spec.head_dim, query_span)
        self.query_up = ColumnLinear(context, num_in=spec.query_rank, outputs=[query_up])
        self.group_output = _GroupOutput(context, spec)
        self.output = RowLinear(
            context.at("wo_b"),
            full_in=spec.num_output_groups * spec.output_rank,
            in_span=self.group_output.span,
            num_out=spec.hidden_size,
        )
        self.index: CompressedIndex | None = None
        if spec.index is not None:
            self.index = CompressedIndex(context.at("indexer"), spec.index, rotary)
        self.compressor: Compressor | None = None
        if spec.compressor is not None:
            self.compressor = Compressor(context.at("compressor"), spec.compressor, rotary)
        self.cache_layout = KvLayerLayout(
            num_kv_heads=1, key_dim=spec.head_dim, value_dim=0, window=spec.window, dtype=context.cache_dtype
        )
        wide = torch.promote_types(context.dtype, torch.float32)
        self._sink_H = torch.empty(heads.length, dtype=wide, device=context.device)
        self._sink_part = WeightPart(target=self._sink_H, full_shape=(spec.num_heads,), cut=(heads.as_slice,))
        self._sink_name = context.full_name("attn_sink")
        self._one_D = torch.ones(spec.head_dim, dtype=context.dtype, device=context.device)
        self._spec = spec
        self._ops = context.ops
        self._rotary = rotary

    def weight_parts(self) -> Mapping[str, WeightParts]:
        """Where the checkpoint's tensors go, by their full names."""
        return {**super().weight_parts(), self._sink_name: self._sink_part}

    def __call__(self, x_TM: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """[T, M] -> [T, M]; writes the step's keys and entries into their caches."""
        spec, rotary = self._spec, self._ops.rotary
        projected = [project(x_TM) for project in self.down]
        fused = projected[0] if len(projected) == 1 else torch.cat(projected, dim=-1)
        latent_TQ, key_TD = torch.split(fused, [spec.query_rank, spec.head_dim], dim=-1)
        latent_TQ = self.query_norm(latent_TQ)
        query_THD = self.query_up(latent_TQ).view(len(x_TM), -1, spec.head_dim)
        query_THD = self._ops.rms_norm(query_THD, self._one_D, spec.norm_eps)
        cos, sin = inputs.once(self._rotary, lambda: self._rotary.at(inputs.batch.positions))
        query_THD = rotate_trailing(rotary, query_THD, cos, sin)
        key_T1D = rotate_trailing(rotary, self.key_norm(key_TD)[:, None], cos, sin)
        output_THD = self._attend(x_TM, latent_TQ, query_THD, key_T1D, inputs)
        output_THD = rotate_trailing(rotary, output_THD, cos, -sin)
        return self.output(self.group_output(output_THD))

    def _attend(
        self,
        x_TM: torch.Tensor,
        latent_TQ: torch.Tensor,
        query_THD: torch.Tensor,
        key_T1D: torch.Tensor,
        inputs: LayerInputs,
    ) -> torch.Tensor:
        """[T, H, D]"""
        scale, tokens = self._spec.head_dim**-0.5, inputs.kv(self.cache_index)
        if self.compressor is None:
            window = inputs.plan(self._spec.window)
            query_THD = window.store(query_THD, key_T1D, key_T1D[..., :0], tokens)
            shared = replace(tokens, value=tokens.key, value_scale=tokens.key_scale)
            return window.attend(query_THD, shared, scale=scale, sink_H=self._sink_H)
        plan = inputs.once((self._spec.window, self._spec.compressor), lambda: self._plan(inputs))
        plan.store(key_T1D[:, 0], tokens)
        selected_TK = None if self.index is None else self.index(x_TM, latent_TQ, inputs)
        entries = self.compressor(x_TM, inputs)
        return plan.attend(query_THD, tokens, entries, scale=scale, sink_H=self._sink_H, selected_TK=selected_TK)

    def _plan(self, inputs: LayerInputs) -> CompressedAttentionPlan:
        metadata, compressor = inputs.batch.attention, self._spec.compressor
        tokens_per_entry = 1 if compressor is None else compressor.tokens_per_entry
        return self._ops.plan_compressed_attention(
            metadata[self._spec.window], metadata[None], tokens_per_entry=tokens_per_entry
        )


class _GroupOutput(DequantizedLinear):
    """The output projections of this rank's groups of heads. One tensor has them all, one after the other."""

    def __init__(self, context: LayerContext, spec: CompressedAttentionSpec) -> None:
        num_outputs = spec.num_output_groups * spec.output_rank
        self.span = even_span(
            num_outputs, context.groups.tensor, what="groups of heads (o_groups)", unit=spec.output_rank
        )
        heads_per_group = spec.num_heads // spec.num_output_groups
        super().__init__(context, num_in=heads_per_group * spec.head_dim, output=Output("wo_a", num_outputs, self.span))
        self._output_rank = spec.output_rank

    def use_weight(self, weight_OI: torch.Tensor) -> None:
        """Keep it by groups."""
        self._weight_GIR = weight_OI.view(-1, self._output_rank, weight_OI.shape[1]).transpose(1, 2)

    def __call__(self, x_THD: torch.Tensor) -> torch.Tensor:
        """[T, H, D] -> [T, G * R]"""
        x_GTI = x_THD.reshape(len(x_THD), len(self._weight_GIR), -1).transpose(0, 1)
        return torch.bmm(x_GTI, self._weight_GIR).transpose(0, 1).flatten(1)


def _down_projections(context: LayerContext, spec: CompressedAttentionSpec) -> tuple[ColumnLinear, ...]:
    """Of hidden states to latent queries and to keys: fused, unless they are stored differently."""
    outputs = [Output("wq_a", spec.query_rank), Output("wkv", spec.head_dim)]
    schemes = {context.scheme([output.name]).name for output in outputs}
    fused = [outputs] if len(schemes) == 1 else [[output] for output in outputs]
    return tuple(ColumnLinear(context, num_in=spec.hidden_size, outputs=some) for some in fused)
