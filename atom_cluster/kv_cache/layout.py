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

from atom_cluster.errors import ConfigError
from atom_cluster.units import align_up, ceil_div

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e4m3fnuz": 1}

PAGE_ALIGNMENT = 16
"""Bytes. What the widest loads of a device need, and a whole number of the words that checksums read."""

GroupKind = Literal["full", "window", "state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayerLayout:
    """Keys and values of one layer on one rank, per token, or one entry of them for several tokens together.

    The entry of tokens e * n .. (e + 1) * n - 1, for n `tokens_per_entry`, belongs to the last of them: it is in that
    token's page, behind the entries that tokens of the page before it have. A page of fewer than n tokens has room for
    one entry, which most pages then do not use.
    """

    num_kv_heads: int
    """Heads on this rank."""
    key_dim: int
    value_dim: int
    """0 where values are part of the keys (latent attention) or there are none (an index)."""
    dtype: str
    """A key of `DTYPE_BYTES`."""
    window: int | None = None
    """Positions that a token of this layer sees, its own included; None: all."""
    tokens_per_entry: int = 1

    @property
    def bytes_per_entry(self) -> int:
        """Bytes stored per entry."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * DTYPE_BYTES[self.dtype]

    def entries_per_page(self, block_size: int) -> int:
        """Entries that a page of `block_size` tokens has room for.

        Raises ConfigError for a size that would cut entries in two at different places in different pages.
        """
        if max(block_size, self.tokens_per_entry) % min(block_size, self.tokens_per_entry) != 0:
            raise ConfigError(
                f"cache.block_size = {block_size} does not fit a model that keeps one entry for "
                f"{self.tokens_per_entry} tokens: one of the two must be a multiple of the other"
            )
        return ceil_div(block_size, self.tokens_per_entry)

    def describe(self) -> str:
        """A string equal exactly when two layouts are."""
        window = "" if self.window is None else f"/{self.window}"
        tokens = "" if self.tokens_per_entry == 1 else f"per{self.tokens_per_entry}"
        return f"{self.dtype}:{self.num_kv_heads}x{self.key_dim}+{self.value_dim}{window}{tokens}"


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
            if isinstance(layer, StateLayerLayout):
                total += layer.num_bytes
            else:
                total += layer.bytes_per_entry * layer.entries_per_page(block_size)
        return align_up(total, PAGE_ALIGNMENT)

    def describe(self) -> str:
        """A string equal exactly when two layouts are; part of an engine's fingerprint."""
        return ",".join(layer.describe() for layer in self.layers)
