"""ForwardBatch: the tensors of one forward pass, built by the runner, read by layers, which keep no state.

Shape suffixes: T tokens of the step, R rows of the step, B blocks per row (padded), S sampled rows, N pages.
All tensors are on the model's device; the `_cpu` tuples are the same numbers for code that must not wait for a device.
The types that ops take are defined in `ops/`, below layers, and offered here too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch

from atom_cluster.ops.attention import AttentionMetadata, AttentionPlan, KvLayerCache
from atom_cluster.ops.gated_delta import StateMetadata
from atom_cluster.ops.table import OpTable

__all__ = ["AttentionMetadata", "ForwardBatch", "KvLayerCache", "LayerInputs", "StateLayerCache", "StateMetadata"]

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class StateLayerCache:
    """States of one recurrent layer: views into the runner's memory, strided over pages."""

    tensors: Mapping[str, torch.Tensor]
    """By the name in the layer's layout, each [N, *shape]."""


LayerCache = KvLayerCache | StateLayerCache


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Inputs of one forward pass."""

    token_ids: torch.Tensor
    """[T] int64"""
    positions: torch.Tensor
    """[T] int64"""
    attention: Mapping[int | None, AttentionMetadata]
    """By the window of the layers it is for; None: layers that see all positions. The latter is always there."""
    caches: tuple[LayerCache, ...]
    """What each layer of the model's `kv_layout` keeps, in that order."""
    sample_index: torch.Tensor
    """[S] int64: indices into T of the tokens whose logits are needed, in row order."""
    state: StateMetadata | None = None
    """None for a model without recurrent layers."""


@dataclass(slots=True)
class LayerInputs:
    """One forward pass as its layers see it: the batch, and what is worked out once for many layers."""

    batch: ForwardBatch
    ops: OpTable
    _shared: dict[Hashable, object] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], V]) -> V:
        """What `make` returned when it was first called with this key in this pass."""
        if key not in self._shared:
            self._shared[key] = make()
        return cast("V", self._shared[key])

    def mixer(self, key: Hashable, make: Callable[[LayerInputs], V]) -> V:
        """A plan of what mixes tokens, made once per pass. `make` gets the pass that it is for, and knows no other.

        What layers do between their mixers may be captured, and repeated for other rows.
        """
        return self.once(("mixer", key), lambda: make(self))

    def plan(self, window: int | None = None, *, keeps_all: bool = False) -> AttentionPlan:
        """Attention for layers with this window. keeps_all: their caches keep what is behind it too."""
        pages = None if keeps_all else window

        def make(inputs: LayerInputs) -> AttentionPlan:
            metadata = inputs.batch.attention[pages]
            return inputs.ops.plan_attention(metadata if pages == window else replace(metadata, window=window))

        return self.mixer(("attention", pages, window), make)

    def kv(self, index: int) -> KvLayerCache:
        """Keys and values of the layer with this cache index."""
        cache = self.batch.caches[index]
        if not isinstance(cache, KvLayerCache):
            raise AssertionError(f"cache {index} holds states, not keys and values")
        return cache

    def state(self, index: int) -> StateLayerCache:
        """States of the layer with this cache index."""
        cache = self.batch.caches[index]
        if not isinstance(cache, StateLayerCache):
            raise AssertionError(f"cache {index} holds keys and values, not states")
        return cache
