"""Grouped-query attention over paged KV, its heads split over the ranks. Knows no models and no block tables.

Shape suffixes: T tokens, M hidden dims, H query heads and K key/value heads of this rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from atom_cluster.kv_cache.layout import KvLayerLayout
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.kv_scales import KvScales
from atom_cluster.layers.linear import ColumnLinear, Output, RowLinear
from atom_cluster.layers.module import CachingModule
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.layers.rotary import RotaryTable
from atom_cluster.ops.activation import GateAndMul
from atom_cluster.ops.attention import HeadNorms, Rotation
from atom_cluster.ops.linear import LinearOp
from atom_cluster.parallel.collectives import all_reduce_sum
from atom_cluster.parallel.sharding import Span, WeightPart, WeightParts, even_span, kv_head_span


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Sizes over all ranks, and options."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int | None = None
    """Of a value head; None: `head_dim`."""
    window: int | None = None
    """Positions that a token sees, its own included; None: all."""
    keeps_all: bool = False
    """Keep all positions even if a token sees a window. Every model must have a layer that does (`KvLayout.groups`)."""
    scale: float | None = None
    """Factor of query-key products; None: head_dim ** -0.5."""
    value_scale: float = 1.0
    """Factor of values."""
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    """RMS norm of queries and keys before rotation: over each head, or over all heads of a token together."""
    norm_eps: float = 1e-6
    is_norm_offset: bool = False
    """The norms' stored weights are what is added to one."""
    has_output_gate: bool = False
    """The query projection is twice as wide, per head a query and then a gate; sigmoid(gate) multiplies the output."""
    sink_name: str | None = None
    """Name of a tensor [num_heads] of attention sinks; None: there are none."""


class Attention(CachingModule):
    """Self-attention with rotary positions."""

    def __init__(self, context: LayerContext, spec: AttentionSpec, rotary: RotaryTable | None) -> None:
        """rotary: None for a layer without positions."""
        group = context.groups.tensor
        value_dim = spec.head_dim if spec.value_dim is None else spec.value_dim
        head_span = even_span(spec.num_heads, group, what="attention heads")
        query_dim = spec.head_dim * (2 if spec.has_output_gate else 1)
        key_span = kv_head_span(spec.num_kv_heads, spec.head_dim, group)
        value_span = kv_head_span(spec.num_kv_heads, value_dim, group)
        outputs = (
            Output("q_proj", spec.num_heads * query_dim, _times(head_span, query_dim)),
            Output("k_proj", spec.num_kv_heads * spec.head_dim, key_span),
            Output("v_proj", spec.num_kv_heads * value_dim, value_span),
        )
        self.qkv = ColumnLinear(context, num_in=spec.hidden_size, outputs=outputs, has_bias=spec.has_qkv_bias)
        self.output = RowLinear(
            context.at("o_proj"),
            full_in=spec.num_heads * value_dim,
            in_span=_times(head_span, value_dim),
            num_out=spec.hidden_size,
            has_bias=spec.has_output_bias,
        )
        self.head_norms: tuple[RmsNorm, ...] = ()
        self.projection_norms: tuple[_ProjectionNorm, ...] = ()
        if spec.qk_norm == "head":
            self.head_norms = tuple(
                RmsNorm(context.at(name), size=spec.head_dim, eps=spec.norm_eps, is_offset=spec.is_norm_offset)
                for name in ("q_norm", "k_norm")
            )
        elif spec.qk_norm == "projection":
            query_span = _times(head_span, spec.head_dim)
            self.projection_norms = (
                _ProjectionNorm(context.at("q_norm"), spec, spec.num_heads * spec.head_dim, query_span),
                _ProjectionNorm(context.at("k_norm"), spec, spec.num_kv_heads * spec.head_dim, key_span),
            )
        self._norms = _head_norms(self.head_norms, spec.norm_eps)
        self.kv_scales = KvScales(context)
        self._sink_H: torch.Tensor | None = None
        self._sink_part: dict[str, WeightPart] = {}
        if spec.sink_name is not None:
            self._sink_H = torch.empty(head_span.length, dtype=torch.float32, device=context.device)
            self._sink_part[context.full_name(spec.sink_name)] = WeightPart(
                target=self._sink_H, full_shape=(spec.num_heads,), cut=(head_span.as_slice,)
            )
        self.cache_layout = KvLayerLayout(
            num_kv_heads=key_span.length // spec.head_dim,
            all_kv_heads=spec.num_kv_heads,
            key_dim=spec.head_dim,
            value_dim=value_dim,
            window=None if spec.keeps_all else spec.window,
            dtype=context.cache_dtype,
        )
        self._spec = spec
        self._ops = context.ops
        self._rotary = rotary
        self._value_dim = value_dim
        self._split = [output.local.length for output in outputs]
        self._scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale

    def weight_parts(self) -> Mapping[str, WeightParts]:
        """Where the checkpoint's tensors go, by their full names."""
        return {**super().weight_parts(), **self._sink_part}

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend."""
        super().finish_loading()
        self._sink_part = {}

    def __call__(self, x_TM: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """[T, M] -> [T, M]; writes the step's KV into its cache."""
        return self.behind_first(self.qkv(x_TM), inputs)

    @property
    def first(self) -> tuple[LinearOp, GateAndMul | None]:
        """The product that its inputs go into, and nothing else; no activation."""
        return self.qkv.op, None

    def behind_first(self, qkv_TO: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """[T, queries, keys and values of this rank side by side] -> [T, M]; writes the step's KV into its cache."""
        num_tokens = qkv_TO.shape[0]
        query, key, value = torch.split(qkv_TO, self._split, dim=-1)
        gate: torch.Tensor | None = None
        if self._spec.has_output_gate:
            query, gate = query.reshape(num_tokens, -1, 2 * self._spec.head_dim).chunk(2, dim=-1)
        if self.projection_norms:
            query, key = self.projection_norms[0](query), self.projection_norms[1](key)
        query_THD = query if gate is not None else query.view(num_tokens, -1, self._spec.head_dim)
        key_TKD = key.view(num_tokens, -1, self._spec.head_dim)
        value_TKD = value.view(num_tokens, -1, self._value_dim)
        if self._spec.value_scale != 1.0:
            value_TKD = value_TKD * self._spec.value_scale
        rotation = _rotation(self._rotary, inputs)
        plan = inputs.plan(self._spec.window, keeps_all=self._spec.keeps_all)
        kv = self.kv_scales.of(inputs.kv(self.cache_index))
        query_THD = plan.store(query_THD, key_TKD, value_TKD, kv, norms=self._norms, rotation=rotation)
        output_THD = plan.attend(query_THD, kv, scale=self._scale, sink_H=self._sink_H)
        if gate is not None:
            output_THD = self._ops.sigmoid_and_mul(output_THD, gate)
        return self.output(output_THD.flatten(1))


class _ProjectionNorm(RmsNorm):
    """The norm over all heads, of all ranks, of one of queries and keys."""

    def __init__(self, context: LayerContext, spec: AttentionSpec, full_size: int, span: Span) -> None:
        super().__init__(
            context,
            size=span.length,
            eps=spec.norm_eps,
            is_offset=spec.is_norm_offset,
            full_size=full_size,
            span=span,
        )
        self._group = context.groups.tensor
        self._full_norm_size = full_size

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, heads * D] -> the same"""
        if self._group.size == 1:
            return super().__call__(x_TI)
        wide = x_TI.to(torch.promote_types(x_TI.dtype, torch.float32))
        # Ranks that share a key/value head count its squares as often as they hold it, and so does the size.
        squares_T1 = all_reduce_sum(wide.square().sum(-1, keepdim=True), self._group)
        size = self._full_norm_size * max(1, self._group.size * x_TI.shape[-1] // self._full_norm_size)
        return (wide * torch.rsqrt(squares_T1 / size + self._eps)).to(x_TI.dtype) * self.weight_D


def _rotation(table: RotaryTable | None, inputs: LayerInputs) -> Rotation | None:
    """By what the step's tokens are rotated, worked out once for all layers with this table."""
    if table is None:
        return None
    return inputs.once((Rotation, table), lambda: Rotation(*table.at(inputs.batch.positions)))


def _head_norms(norms: tuple[RmsNorm, ...], eps: float) -> HeadNorms | None:
    """As the op takes them, of queries and of keys; None if there are none."""
    if not norms:
        return None
    query, key = norms
    return HeadNorms(query.weight_D, key.weight_D, eps)


def _times(span: Span, unit: int) -> Span:
    """A span of heads as a span of dims."""
    return Span(span.start * unit, span.length * unit)
