"""KvLayout: what each layer keeps between steps, in which groups of pages. Sizes and names, no tensors.

What differs between ranks, and between engines that split a model over different numbers of them, is only which heads a
layer has; `page_map` says where in a page they are.

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
    all_kv_heads: int | None = None
    """Heads of the model, which are divided over the ranks; None: every rank has the same ones."""
    key_dim: int
    value_dim: int
    """0 where values are part of the keys (latent attention) or there are none (an index)."""
    dtype: str
    """A key of `DTYPE_BYTES`."""
    window: int | None = None
    """Positions that a token of this layer sees, its own included; None: all."""
    tokens_per_entry: int = 1

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
        """A string equal exactly when the layouts of all ranks together are, however many there are."""
        window = "" if self.window is None else f"/{self.window}"
        tokens = "" if self.tokens_per_entry == 1 else f"per{self.tokens_per_entry}"
        num_heads = self.num_kv_heads if self.all_kv_heads is None else self.all_kv_heads
        return f"{self.dtype}:{num_heads}x{self.key_dim}+{self.value_dim}{window}{tokens}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """One tensor of a layer's recurrent state."""

    name: str
    shape: tuple[int, ...]
    """On this rank."""
    dtype: str
    """A key of `DTYPE_BYTES`."""
    sections: tuple[int, ...] = ()
    """Lengths, over all ranks, of the consecutive parts of the first axis, each of which is divided evenly over the
    ranks; empty: every rank has the same tensor."""

    def describe(self) -> str:
        """A string equal exactly when the tensors of all ranks together are."""
        first = "+".join(map(str, self.sections or self.shape[:1]))
        return f"{self.name}{'x'.join((first, *map(str, self.shape[1:])))}:{self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayerLayout:
    """State of one recurrent layer on one rank, per request."""

    tensors: tuple[StateTensor, ...]
    """Widest dtype first, so that each starts aligned."""

    def describe(self) -> str:
        """A string equal exactly when the layouts of all ranks together are, however many there are."""
        return "state:" + "&".join(tensor.describe() for tensor in self.tensors)


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


@dataclass(frozen=True, slots=True)
class PageTensor:
    """One tensor of one layer within a page."""

    layer: int
    """Index into the layout's layers."""
    name: str
    """`key`, `value`, or a state tensor's."""
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size within each page."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


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
        total = sum(tensor.num_bytes for tensor in self.page_tensors(group, block_size))
        return align_up(total, PAGE_ALIGNMENT)

    def page_tensors(self, group: CacheGroup, block_size: int) -> tuple[PageTensor, ...]:
        """What a page of the group holds, in order: wide dtypes first, so that each tensor starts aligned.

        Keys and values are [entries, heads, dim].
        """
        tensors: list[PageTensor] = []
        for index in group.layers:
            layer = self.layers[index]
            if isinstance(layer, StateLayerLayout):
                tensors += [PageTensor(index, tensor.name, tensor.shape, tensor.dtype) for tensor in layer.tensors]
            else:
                rows = (layer.entries_per_page(block_size), layer.num_kv_heads)
                tensors.append(PageTensor(index, "key", (*rows, layer.key_dim), layer.dtype))
                tensors.append(PageTensor(index, "value", (*rows, layer.value_dim), layer.dtype))
        return tuple(sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype]))

    def describe(self) -> str:
        """A string equal exactly when the layouts of all ranks together are; part of an engine's fingerprint."""
        return ",".join(layer.describe() for layer in self.layers)
