"""Gated DeltaNet: linear attention whose state per head is rewritten by every token. Knows no models.

    q, k, v = silu(conv(W_qkv x));  S <- exp(g) S + k (beta (v - k^T exp(g) S))^T;  y = W_o (norm(S^T q) * silu(W_z x))

Its heads are split over the ranks: by key head, value heads and channels of the convolution with them. Shape suffixes:
T tokens, M hidden dims; on this rank: G key heads, H value heads, K dims of a key, V dims of a value, C channels
(those of all queries, then keys, then values), W weights of a channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from atom_cluster.kv_cache.layout import StateLayerLayout, StateTensor
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import LayerInputs
from atom_cluster.layers.linear import ColumnLinear, Output, RowLinear
from atom_cluster.layers.module import CachingModule
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.ops.gated_delta import GatedDeltaPlan, Gates
from atom_cluster.parallel.groups import Group
from atom_cluster.parallel.sharding import Span, WeightPart, WeightParts, even_span


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaSpec:
    """Sizes over all ranks, and how a checkpoint arranges the projections."""

    hidden_size: int
    num_key_heads: int
    num_value_heads: int
    """A multiple of `num_key_heads`."""
    key_dim: int
    value_dim: int
    conv_size: int
    """Tokens that the convolution sees, the present one included."""
    norm_eps: float
    is_grouped: bool
    """True: `in_proj_qkvz` and `in_proj_ba`, with outputs in groups by key head. False: `in_proj_qkv`, `in_proj_z`,
    `in_proj_b` and `in_proj_a`, with all heads of queries, then keys, then values."""

    @property
    def group_size(self) -> int:
        """Value heads per key head."""
        return self.num_value_heads // self.num_key_heads

    @property
    def all_keys(self) -> int:
        """Dims of all key heads."""
        return self.num_key_heads * self.key_dim

    @property
    def all_values(self) -> int:
        """Dims of all value heads."""
        return self.num_value_heads * self.value_dim


class GatedDeltaNet(CachingModule):
    """Linear attention by the gated delta rule, behind a short convolution."""

    def __init__(self, context: LayerContext, spec: GatedDeltaSpec) -> None:
        self._spec = spec
        self._ops = context.ops
        self._heads = _Heads(spec, context.groups.tensor)
        qkvz, ba = self._heads.grouped_outputs() if spec.is_grouped else self._heads.separate_outputs()
        self.qkvz = ColumnLinear(context, num_in=spec.hidden_size, outputs=qkvz)
        self.ba = ColumnLinear(context, num_in=spec.hidden_size, outputs=ba)
        self.norm = RmsNorm(context.at("norm"), size=spec.value_dim, eps=spec.norm_eps)
        self.output = RowLinear(
            context.at("out_proj"),
            full_in=spec.all_values,
            in_span=self._heads.values(spec.value_dim),
            num_out=spec.hidden_size,
        )
        num_channels, num_heads = self._heads.num_channels, self._heads.values(1).length
        wide = torch.promote_types(context.dtype, torch.float32)
        self._conv_C1W = torch.empty(num_channels, 1, spec.conv_size, dtype=context.dtype, device=context.device)
        self._log_rate_H = torch.empty(num_heads, dtype=wide, device=context.device)
        self._decay_bias_H = torch.empty(num_heads, dtype=wide, device=context.device)
        self._names = {name: context.full_name(name) for name in ("conv1d.weight", "A_log", "dt_bias")}
        self.cache_layout = StateLayerLayout(
            tensors=(
                StateTensor(
                    name="recurrent",
                    shape=(num_heads, spec.key_dim, spec.value_dim),
                    dtype=_name(wide),
                    sections=(spec.num_value_heads,),
                ),
                StateTensor(
                    name="conv",
                    shape=(num_channels, spec.conv_size - 1),
                    dtype=_name(context.dtype),
                    sections=(spec.all_keys, spec.all_keys, spec.all_values),
                ),
            )
        )

    def weight_parts(self) -> Mapping[str, WeightParts]:
        """Where the checkpoint's tensors go, by their full names."""
        spec, heads = self._spec, self._heads
        channels = torch.split(self._conv_C1W, heads.channel_sizes)
        full_shape = (2 * spec.all_keys + spec.all_values, 1, spec.conv_size)
        own: dict[str, WeightParts] = {
            self._names["conv1d.weight"]: tuple(
                WeightPart(target=target, full_shape=full_shape, cut=(span.as_slice,))
                for target, span in zip(channels, heads.channel_spans())
            )
        }
        for name, target in (("A_log", self._log_rate_H), ("dt_bias", self._decay_bias_H)):
            own[self._names[name]] = WeightPart(
                target=target, full_shape=(spec.num_value_heads,), cut=(heads.values(1).as_slice,)
            )
        return {**super().weight_parts(), **own}

    def finish_loading(self) -> None:
        """All weights are in place: those of channels that are neighbours become neighbours, as their inputs are."""
        super().finish_loading()
        self._conv_CW = self._conv_C1W[:, 0].T.contiguous().T

    def __call__(self, x_TM: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """[T, M] -> [T, M]; writes the step's states into its cache."""
        spec, states = self._spec, inputs.state(self.cache_index).tensors
        plan = inputs.mixer("gated delta", _plan)
        qkvz = self.qkvz(x_TM)
        qkv_TC, z_TI = qkvz[:, : self._heads.num_channels], qkvz[:, self._heads.num_channels :]
        learn_TH, decay_TH = self.ba(x_TM).chunk(2, dim=-1)
        qkv_TC = plan.convolve(qkv_TC, self._conv_CW, states["conv"])
        query, key, value = torch.split(qkv_TC, self._heads.channel_sizes, dim=-1)
        num_tokens = len(x_TM)
        output_THV = plan.delta_rule(
            query.view(num_tokens, -1, spec.key_dim),
            key.view(num_tokens, -1, spec.key_dim),
            value.view(num_tokens, -1, spec.value_dim),
            Gates(decay_TH, learn_TH, self._log_rate_H, self._decay_bias_H),
            states["recurrent"],
        )
        z_THV = z_TI.view(num_tokens, -1, spec.value_dim)
        return self.output(self._ops.gated_rms_norm(output_THV, z_THV, self.norm.weight_D, spec.norm_eps).flatten(1))


class _Heads:
    """A rank's heads, and where they are in the checkpoint's tensors."""

    def __init__(self, spec: GatedDeltaSpec, group: Group) -> None:
        self._spec = spec
        self._heads = even_span(spec.num_key_heads, group, what="key heads of linear attention")

    def keys(self, unit: int) -> Span:
        """The key heads, in units of so many indices per head."""
        return Span(self._heads.start * unit, self._heads.length * unit)

    def values(self, unit: int) -> Span:
        """The value heads, in units of so many indices per head."""
        return self.keys(self._spec.group_size * unit)

    @property
    def num_channels(self) -> int:
        """Dims of queries, keys and values together."""
        return sum(self.channel_sizes)

    @property
    def channel_sizes(self) -> list[int]:
        """Dims of queries, of keys, and of values."""
        return [span.length for span in self.channel_spans()]

    def channel_spans(self) -> tuple[Span, Span, Span]:
        """Queries, keys and values among the channels of all ranks."""
        spec = self._spec
        keys, values = self.keys(spec.key_dim), self.values(spec.value_dim)
        return keys, _moved(keys, spec.all_keys), _moved(values, 2 * spec.all_keys)

    def separate_outputs(self) -> tuple[list[Output], list[Output]]:
        """q, k, v, z and b, a from tensors that have them one behind the other."""
        spec = self._spec
        num_channels = 2 * spec.all_keys + spec.all_values
        qkvz = [Output("in_proj_qkv", num_channels, span) for span in self.channel_spans()]
        qkvz.append(Output("in_proj_z", spec.all_values, self.values(spec.value_dim)))
        return qkvz, [Output(name, spec.num_value_heads, self.values(1)) for name in ("in_proj_b", "in_proj_a")]

    def grouped_outputs(self) -> tuple[list[Output], list[Output]]:
        """The same from tensors that have, for each key head, its share of each."""
        spec = self._spec
        value_size = spec.group_size * spec.value_dim
        qkvz = self._regroup("in_proj_qkvz", (spec.key_dim, spec.key_dim, value_size, value_size))
        return qkvz, self._regroup("in_proj_ba", (spec.group_size, spec.group_size))

    def _regroup(self, name: str, sizes: tuple[int, ...]) -> list[Output]:
        """Kind by kind what the tensor has head by head; `sizes` are those of the kinds, per key head."""
        full_size = self._spec.num_key_heads * sum(sizes)
        heads = range(self._heads.start, self._heads.stop)
        return [
            Output(name, full_size, Span(head * sum(sizes) + sum(sizes[:kind]), size))
            for kind, size in enumerate(sizes)
            for head in heads
        ]


def _plan(inputs: LayerInputs) -> GatedDeltaPlan:
    batch = inputs.batch
    if batch.state is None:
        raise AssertionError("a recurrent layer got a batch without states")
    return inputs.ops.plan_gated_delta(batch.attention[None], batch.state)


def _moved(span: Span, offset: int) -> Span:
    return Span(span.start + offset, span.length)


def _name(dtype: torch.dtype) -> str:
    """A dtype as `kv_cache.layout` spells it."""
    return str(dtype).removeprefix("torch.")
