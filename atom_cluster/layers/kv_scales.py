"""Scales of a checkpoint for keys and values that are cached in float8. Knows no attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import KvLayerCache
from atom_cluster.layers.module import Module
from atom_cluster.parallel.sharding import WeightPart, WeightParts, whole

_KEY_NAMES = ("k_scale", "attn.k_scale", "k_proj.k_scale", "k_proj.output_scale")
_VALUE_NAMES = ("v_scale", "attn.v_scale", "v_proj.v_scale", "v_proj.output_scale")


class KvScales(Module):
    """What keys and values are divided by before they are cached: 1 unless cache and checkpoint say otherwise."""

    def __init__(self, context: LayerContext) -> None:
        """context: of the attention layer."""
        self._key, self._value = 1.0, 1.0
        self._unit = 2.0 if context.cache_dtype == "float8_e4m3fnuz" else 1.0
        """The largest number of that kind is about half as large, so scales are twice as large."""
        is_float8 = context.cache_dtype.startswith("float8")
        self._names = [
            next((full for name in names if (full := context.full_name(name)) in context.stored_dtypes), None)
            for names in (_KEY_NAMES, _VALUE_NAMES)
            if is_float8
        ]
        self._loaded = torch.ones(len(self._names))

    def weight_parts(self) -> Mapping[str, WeightParts]:
        """Where those that the checkpoint has go."""
        parts: dict[str, WeightPart] = {}
        for index, name in enumerate(self._names):
            if name is not None:
                parts[name] = whole(self._loaded[index])
        return parts

    def finish_loading(self) -> None:
        """All weights are in place: remember the scales as numbers."""
        if self._names:
            self._key, self._value = (self._loaded * self._unit).tolist()

    def of(self, kv: KvLayerCache) -> KvLayerCache:
        """The cache with its scales."""
        if self._key == self._value == 1.0:
            return kv
        return replace(kv, key_scale=self._key, value_scale=self._value)
