"""Multi-head latent attention, its heads split over the ranks; latents are computed and cached on every rank.

With an index (`indexer.py`) it is sparse. Knows no models and no block tables; `ops/mla.py` has the equations.
Shape suffixes: T tokens, M hidden dims, Q dims of the latent query, H query heads of this rank, L latent dims, N dims
without and P dims with position of a query head, V value dims of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atom_cluster.kv_cache.layout import KvLayerLayout
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.indexer import Indexer, IndexerSpec
from atom_cluster.layers.linear import ColumnLinear, DequantizedLinear, Output, RowLinear
from atom_cluster.layers.module import CachingModule
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.layers.rotary import RotaryTable
from atom_cluster.ops.attention import Rotation
from atom_cluster.ops.mla import LatentNorm, LatentWeights, MlaDims
from atom_cluster.parallel.sharding import Span, even_span


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec:
    """Sizes over all ranks, and options."""

    hidden_size: int
    num_heads: int
    query_rank: int | None
    """Dims of the latent that queries are projections of; None: they are projections of the hidden state."""
    latent_dim: int
    """Dims of the latent that keys and values are projections of (`kv_lora_rank`)."""
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    """Factor of query-key products."""
    norm_eps: float
    """Of the latents' norms."""
    has_bias: bool
    """The projections of hidden states to latents and the output projection have one."""
    is_rope_interleaved: bool
    """Rotated dims are paired with their neighbours, not by halves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionSpec:
    """Whose selection a sparse layer attends to."""

    source: int
    """Index of the layer that selects."""
    indexer: IndexerSpec | None
    """None when that layer is another one, before this."""


class MlaAttention(CachingModule):
    """Self-attention whose keys and values are projections of one cached latent per token."""

    def __init__(
        self, context: LayerContext, spec: MlaSpec, rotary: RotaryTable, selection: SelectionSpec | None = None
    ) -> None:
        """selection: None for attention to all positions. Needs latent queries."""
        heads = even_span(spec.num_heads, context.groups.tensor, what="attention heads")
        query_dim = spec.nope_dim + spec.rope_dim
        queries = Output("q_proj", spec.num_heads * query_dim, _times(heads, query_dim))
        if spec.query_rank is not None:
            queries = Output("q_a_proj", spec.query_rank)
            self.query_norm = RmsNorm(context.at("q_a_layernorm"), size=spec.query_rank, eps=spec.norm_eps)
            query_up = Output("q_b_proj", spec.num_heads * query_dim, _times(heads, query_dim))
            self.query_up = ColumnLinear(context, num_in=spec.query_rank, outputs=[query_up])
        latents = Output("kv_a_proj_with_mqa", spec.latent_dim + spec.rope_dim)
        self.down = _down_projections(context, spec, queries, latents)
        self.latent_norm = RmsNorm(context.at("kv_a_layernorm"), size=spec.latent_dim, eps=spec.norm_eps)
        self.up = _LatentUp(context, spec, heads)
        self.output = RowLinear(
            context.at("o_proj"),
            full_in=spec.num_heads * spec.value_dim,
            in_span=_times(heads, spec.value_dim),
            num_out=spec.hidden_size,
            has_bias=spec.has_bias,
        )
        self.indexer: Indexer | None = None
        if selection is not None and selection.indexer is not None:
            self.indexer = Indexer(context.at("indexer"), selection.indexer, rotary)
        self.cache_layout = KvLayerLayout(
            num_kv_heads=1, key_dim=spec.latent_dim + spec.rope_dim, value_dim=0, dtype=context.cache_dtype
        )
        self._split = [queries.local.length, spec.latent_dim, spec.rope_dim]
        self._selection = selection
        self._spec = spec
        self._ops = context.ops
        self._rotary = rotary

    @property
    def widest(self) -> int:
        """Queries, the keys and values that a prompt's latents expand to, and what heads make of them."""
        dims = self.up.dims
        return dims.num_heads * (2 * dims.nope_dim + dims.rope_dim + 2 * dims.value_dim)

    def __call__(self, x_TM: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """[T, M] -> [T, M]; writes the step's latents into its cache."""
        spec, dims, num_tokens = self._spec, self.up.dims, len(x_TM)
        projected = [project(x_TM) for project in self.down]
        fused = projected[0] if len(projected) == 1 else torch.cat(projected, dim=-1)
        query, latent_TL, key_TP = torch.split(fused, self._split, dim=-1)
        latent_query_TQ: torch.Tensor | None = None
        if spec.query_rank is not None:
            latent_query_TQ = self.query_norm(query)
            query = self.query_up(latent_query_TQ)
        query_THN, rope_THP = torch.split(
            query.view(num_tokens, dims.num_heads, -1), [spec.nope_dim, spec.rope_dim], dim=-1
        )
        rotation = inputs.once((Rotation, self._rotary), lambda: Rotation(*self._rotary.at(inputs.batch.positions)))
        plan = inputs.mixer(dims, lambda inputs: inputs.ops.plan_mla(inputs.batch.attention[None], dims))
        kv = inputs.kv(self.cache_index)
        rope_THP = plan.store(
            latent_TL,
            key_TP,
            rope_THP,
            kv,
            norm=LatentNorm(self.latent_norm.weight_D, spec.norm_eps),
            rotation=rotation,
            is_interleaved=spec.is_rope_interleaved,
        )
        selected_TK = self._select(x_TM, latent_query_TQ, inputs)
        output_THV = plan.attend(query_THN, rope_THP, self.up.weights, kv, scale=spec.scale, selected_TK=selected_TK)
        return self.output(output_THV.flatten(1))

    def _select(
        self, x_TM: torch.Tensor, latent_query_TQ: torch.Tensor | None, inputs: LayerInputs
    ) -> torch.Tensor | None:
        """Positions to attend to: this layer's selection, or that of the layer whose it shares; None: all."""
        if self._selection is None:
            return None

        def select() -> torch.Tensor | None:
            if self.indexer is None or latent_query_TQ is None:
                raise AssertionError("a layer that shares a selection is before the one that makes it")
            return self.indexer(x_TM, latent_query_TQ, inputs)

        return inputs.once(("selection", self._selection.source), select)


class _LatentUp(DequantizedLinear):
    """From latents to the keys and values of this rank's heads."""

    weights: LatentWeights
    """Set by `finish_loading`."""

    def __init__(self, context: LayerContext, spec: MlaSpec, heads: Span) -> None:
        per_head = spec.nope_dim + spec.value_dim
        output = Output("kv_b_proj", spec.num_heads * per_head, _times(heads, per_head))
        super().__init__(context, num_in=spec.latent_dim, output=output)
        self._ops, self._dtype = context.ops, context.dtype
        self.dims = MlaDims(
            num_heads=heads.length,
            latent_dim=spec.latent_dim,
            nope_dim=spec.nope_dim,
            rope_dim=spec.rope_dim,
            value_dim=spec.value_dim,
        )

    def use_weight(self, weight_OI: torch.Tensor) -> None:
        """Prepare them for the op backend."""
        weight_HOL = weight_OI.view(self.dims.num_heads, -1, self.dims.latent_dim)
        self.weights = self._ops.prepare_latent_weights(weight_HOL, self.dims, dtype=self._dtype)


def _down_projections(
    context: LayerContext, spec: MlaSpec, queries: Output, latents: Output
) -> tuple[ColumnLinear, ...]:
    """Of hidden states to (latent) queries and to latents: fused, unless they are stored differently."""
    are_queries_latent = spec.query_rank is not None
    schemes = [context.scheme([output.name]).name for output in (queries, latents)]
    if schemes[0] == schemes[1] and (are_queries_latent or not spec.has_bias):
        return (ColumnLinear(context, num_in=spec.hidden_size, outputs=[queries, latents], has_bias=spec.has_bias),)
    return (
        ColumnLinear(
            context, num_in=spec.hidden_size, outputs=[queries], has_bias=spec.has_bias and are_queries_latent
        ),
        ColumnLinear(context, num_in=spec.hidden_size, outputs=[latents], has_bias=spec.has_bias),
    )


def _times(span: Span, unit: int) -> Span:
    """A span of heads as a span of dims."""
    return Span(span.start * unit, span.length * unit)
