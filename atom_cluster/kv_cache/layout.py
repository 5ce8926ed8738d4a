"""KvLayout: what each layer keeps between steps, in which groups of pages. Sizes and names, no tensors.

Layers that keep the same span of the past share pages, and so form a group: those that keep everything, those that keep
a window of one size, and those that keep a state that is rewritten by every token. A page of a paged group holds
`block_size` tokens of all its layers; a page of the state group holds one state of all its layers. The first group of a
layout always keeps everything: its pages are the blocks that prefixes are known by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from atom_cluster.units import align_up

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e4m3fnuz": 1}

PAGE_ALIGNMENT = 16
"""Bytes. What the widest loads of a device need, and a whole number of the words that checksums read."""

GroupKind = Literal["full", "window", "state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayerLayout:
    """Keys and values of one layer on one rank, per token."""

    num_kv_heads: int
    """Heads on this rank."""
    key_dim: int
    value_dim: int
    """0 where values are part of the keys (latent attention) or there are none (an index)."""
    dtype: str
    """A key of `DTYPE_BYTES`."""
    window: int | None = None
    """Positions that a token of this layer sees, its own included; None: all."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes stored per token."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * DTYPE_BYTES[self.dtype]

    def describe(self) -> str:
        """A string equal exactly when two layouts are."""
        window = "" if self.window is None else f"/{self.window}"
        return f"{self.dtype}:{self.num_kv_heads}x{self.key_dim}+{self.value_dim}{window}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """One tensor of a layer's recurrent state."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """A key of `DTYPE_BYTES`."""

    @property
    def num_bytes(self) -> int:
        """Size of one copy."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayerLayout:
    """State of one recurrent layer on one rank, per request."""

    tensors: tuple[StateTensor, ...]
    """Widest dtype first, so that each starts aligned."""

    @property
    def num_bytes(self) -> int:
        """Bytes of one state."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def describe(self) -> str:
        """A string equal exactly when two layouts are."""
        return "state:" + "+".join(f"{t.name}{'x'.join(map(str, t.shape))}:{t.dtype}" for t in self.tensors)


LayerLayout = KvLayerLayout | StateLayerLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """Layers whose pages come and go together."""

    kind: GroupKind
    window: int | None
    """Of a window group."""
    layers: tuple[int, ...]
    """Indices into the layout's layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGroup:
    """Pages of a cache group other than the first, as a device has them."""

    kind: GroupKind
    """window or state."""
    window: int | None
    """Of a window group: positions that a token sees, its own included."""
    num_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """What all layers of a model keep on one rank."""

    layers: tuple[LayerLayout, ...]

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        """The full group first, then windows from small to large, then the state group, as far as there are any.

        Raises ValueError for a layout without a layer that keeps everything.
        """
        paged = [(i, layer) for i, layer in enumerate(self.layers) if isinstance(layer, KvLayerLayout)]
        full = tuple(i for i, layer in paged if layer.window is None)
        if not full:
            raise ValueError("a model needs a layer that attends to all positions")
        groups = [CacheGroup(kind="full", window=None, layers=full)]
        for window in sorted({layer.window for _, layer in paged if layer.window is not None}):
            members = tuple(i for i, layer in paged if layer.window == window)
            groups.append(CacheGroup(kind="window", window=window, layers=members))
        states = tuple(i for i, layer in enumerate(self.layers) if isinstance(layer, StateLayerLayout))
        if states:
            groups.append(CacheGroup(kind="state", window=None, layers=states))
        return tuple(groups)

    def page_bytes(self, group: CacheGroup, block_size: int) -> int:
        """Bytes of one page of a group on this rank, padded so that every page starts aligned."""
        total = 0
        for index in group.layers:
            layer = self.layers[index]
            total += layer.num_bytes if isinstance(layer, StateLayerLayout) else layer.bytes_per_token * block_size
        return align_up(total, PAGE_ALIGNMENT)

    def describe(self) -> str:
        """A string equal exactly when two layouts are; part of an engine's fingerprint."""
        return ",".join(layer.describe() for layer in self.layers)
