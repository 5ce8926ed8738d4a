"""Compressed keys: every so many tokens leave one entry behind. Replicated on every rank. Knows no attention.

What is pooled is cached for the tokens of unfinished groups, in a window, so that a group may be computed in any number
of steps, begin in a cached prefix and be taken back with rejected drafts. `ops/compression.py` has the equations.
Shape suffixes: T tokens, M hidden dims, C dims of all series, D dims of an entry, S slots of an entry, N entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from atom_cluster.kv_cache.layout import KvLayerLayout, LayerLayout
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import KvLayerCache, LayerInputs
from atom_cluster.layers.linear import ColumnLinear, Output
from atom_cluster.layers.module import CachingModule, Module
from atom_cluster.layers.norm import RmsNorm
from atom_cluster.layers.rotary import RotaryTable, rotate_trailing
from atom_cluster.parallel.sharding import WeightParts, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressorSpec:
    """Sizes and options."""

    hidden_size: int
    entry_dim: int
    tokens_per_entry: int
    has_overlap: bool
    """An entry is also made of the tokens of the group before, which have a second series of values for that."""
    norm_eps: float

    @property
    def num_series(self) -> int:
        """Values and gates that each token has."""
        return 2 if self.has_overlap else 1


class Compressor(Module):
    """Pools values of neighbouring tokens into entries, which are keys with a position."""

    def __init__(self, context: LayerContext, spec: CompressorSpec, rotary: RotaryTable) -> None:
        width = spec.num_series * spec.entry_dim
        self.values_and_gates = ColumnLinear(
            context.unquantized, num_in=spec.hidden_size, outputs=[Output("wkv", width), Output("wgate", width)]
        )
        self.norm = RmsNorm(context.at("norm"), size=spec.entry_dim, eps=spec.norm_eps, is_wide=True)
        window = spec.num_series * spec.tokens_per_entry
        self.inputs_cache = _Cache(
            KvLayerLayout(
                num_kv_heads=1,
                key_dim=width,
                value_dim=width,
                window=window,
                dtype=str(context.dtype).removeprefix("torch."),
            )
        )
        self.entries_cache = _Cache(
            KvLayerLayout(
                num_kv_heads=1,
                key_dim=spec.entry_dim,
                value_dim=0,
                tokens_per_entry=spec.tokens_per_entry,
                dtype=context.cache_dtype,
            )
        )
        wide = torch.promote_types(context.dtype, torch.float32)
        self._bias_name = context.full_name("ape")
        self._stored_bias = torch.empty(spec.tokens_per_entry, width, dtype=wide, device=context.device)
        self._window = window
        self._spec = spec
        self._ops = context.ops
        self._rotary = rotary

    def weight_parts(self) -> Mapping[str, WeightParts]:
        """Where the checkpoint's tensors go, by their full names."""
        return {**super().weight_parts(), self._bias_name: whole(self._stored_bias)}

    def finish_loading(self) -> None:
        """All weights are in place: put the biases of series, which lie side by side, one after the other."""
        super().finish_loading()
        self._bias_SD = torch.cat(self._stored_bias.chunk(self._spec.num_series, dim=-1))

    def __call__(self, x_TM: torch.Tensor, inputs: LayerInputs) -> KvLayerCache:
        """[T, M] -> the cache of entries, those that the step completes included."""
        spec, metadata = self._spec, inputs.batch.attention
        key = ("compression", spec.tokens_per_entry, spec.num_series)
        plan = inputs.once(
            key,
            lambda: self._ops.plan_compression(
                metadata[self._window],
                metadata[None],
                tokens_per_entry=spec.tokens_per_entry,
                num_series=spec.num_series,
            ),
        )
        value_TC, gate_TC = self.values_and_gates(x_TM).chunk(2, dim=-1)
        pooled_ND = plan.pool(value_TC, gate_TC, self._bias_SD, inputs.kv(self.inputs_cache.cache_index))
        cos, sin = inputs.once((key, self._rotary), lambda: self._rotary.at(plan.first_positions))
        entry_N1D = rotate_trailing(self._ops.rotary, self.norm(pooled_ND)[:, None], cos, sin)
        entries = inputs.kv(self.entries_cache.cache_index)
        plan.store(entry_N1D[:, 0], entries)
        return entries


class _Cache(CachingModule):
    """What a part keeps that keeps more than one thing."""

    def __init__(self, layout: LayerLayout) -> None:
        self.cache_layout = layout
