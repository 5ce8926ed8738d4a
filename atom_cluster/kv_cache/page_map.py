"""Where in a page what is: of which token and which head, on any rank of any engine of a model. Bytes, no tensors.

A page is one tensor after the other (`KvLayout.page_tensors`). Each has rows, one after the other: one per entry of the
page's tokens, or a single one if it is part of a state. A row of all ranks together consists of sections, such as the
key heads of a layer, and each section of equal units, such as heads. A section is divided over the ranks, or every rank
has it whole; so the rank's number, the number of ranks and the block size say which bytes are where. Engines that
differ in nothing else can therefore read from each other (`kv_transfer.routes`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from atom_cluster.kv_cache.layout import (
    DTYPE_BYTES,
    PAGE_ALIGNMENT,
    CacheGroup,
    KvLayerLayout,
    KvLayout,
    StateLayerLayout,
    StateTensor,
)
from atom_cluster.units import align_up, ceil_div


@dataclass(frozen=True, slots=True)
class RowSection:
    """Equal units of a row, one after the other."""

    num_units: int
    """Of all ranks together."""
    unit_bytes: int
    is_divided: bool
    """Over the ranks; else each of them has all units."""

    def share(self, rank: int, world_size: int) -> range:
        """Units that the rank has. With more ranks than units, neighbours have the same one (as `kv_head_span`)."""
        if not self.is_divided:
            return range(self.num_units)
        if world_size > self.num_units:
            unit = rank * self.num_units // world_size
            return range(unit, unit + 1)
        return range(rank * self.num_units // world_size, (rank + 1) * self.num_units // world_size)


@dataclass(frozen=True, slots=True)
class PagePart:
    """One tensor of a page."""

    sections: tuple[RowSection, ...]
    tokens_per_row: int | None
    """None: there is one row, whatever the block size; it is part of a state."""

    def num_rows(self, block_size: int) -> int:
        """Rows that a page of so many tokens has room for."""
        return 1 if self.tokens_per_row is None else ceil_div(block_size, self.tokens_per_row)

    def rows_of(self, start: int, stop: int, block_size: int) -> range:
        """Rows of the tokens [start, stop) of a page: those whose last token is among them.

        A page of fewer tokens than a row is made of counts as one that ends the row; whether it does is not known here.
        """
        tokens = self.tokens_per_row
        if tokens is None:
            return range(1)
        if block_size < tokens:
            return range(stop // block_size)
        return range(start // tokens, stop // tokens)

    def row_bytes(self, rank: int, world_size: int) -> int:
        """Bytes of the rank's part of a row."""
        return sum(len(section.share(rank, world_size)) * section.unit_bytes for section in self.sections)


@dataclass(frozen=True, slots=True)
class PageMap:
    """Pages of one cache group."""

    parts: tuple[PagePart, ...]
    """In order; none is empty."""

    @property
    def is_state(self) -> bool:
        """Whether a page is a state, which knows no tokens."""
        return any(part.tokens_per_row is None for part in self.parts)

    def offsets(self, rank: int, world_size: int, block_size: int) -> list[int]:
        """Where each part begins in a page of the rank; last, where the page's content ends."""
        offsets = [0]
        for part in self.parts:
            offsets.append(offsets[-1] + part.num_rows(block_size) * part.row_bytes(rank, world_size))
        return offsets

    def page_bytes(self, rank: int, world_size: int, block_size: int) -> int:
        """Size of a page of the rank, as `KvLayout.page_bytes`."""
        return align_up(self.offsets(rank, world_size, block_size)[-1], PAGE_ALIGNMENT)


def page_maps(layout: KvLayout) -> tuple[PageMap, ...]:
    """The pages of each group of a layout. Layouts of all ranks and of all block sizes give the same."""
    return tuple(PageMap(_parts(layout, group)) for group in layout.groups)


def opaque_page(num_bytes: int) -> PageMap:
    """Pages of which nothing is known but their size, equal on all ranks."""
    return PageMap((PagePart((RowSection(1, num_bytes, is_divided=False),), tokens_per_row=None),))


def _parts(layout: KvLayout, group: CacheGroup) -> tuple[PagePart, ...]:
    parts = []
    for tensor in layout.page_tensors(group, _any_block_size(layout, group)):
        layer = layout.layers[tensor.layer]
        unit_bytes = DTYPE_BYTES[tensor.dtype] * math.prod(tensor.shape[1:])
        if isinstance(layer, StateLayerLayout):
            state = next(state for state in layer.tensors if state.name == tensor.name)
            parts.append(PagePart(_state_sections(state, unit_bytes), tokens_per_row=None))
        elif tensor.num_bytes:
            parts.append(PagePart((_heads(layer, tensor.shape[-1]),), layer.tokens_per_entry))
    return tuple(parts)


def _any_block_size(layout: KvLayout, group: CacheGroup) -> int:
    """One that fits the group's layers; parts do not depend on it."""
    layers = (layout.layers[index] for index in group.layers)
    return max((layer.tokens_per_entry for layer in layers if isinstance(layer, KvLayerLayout)), default=1)


def _heads(layer: KvLayerLayout, head_dim: int) -> RowSection:
    unit_bytes = head_dim * DTYPE_BYTES[layer.dtype]
    if layer.all_kv_heads is None:
        return RowSection(layer.num_kv_heads, unit_bytes, is_divided=False)
    return RowSection(layer.all_kv_heads, unit_bytes, is_divided=True)


def _state_sections(state: StateTensor, unit_bytes: int) -> tuple[RowSection, ...]:
    if not state.sections:
        return (RowSection(state.shape[0], unit_bytes, is_divided=False),)
    return tuple(RowSection(length, unit_bytes, is_divided=True) for length in state.sections)


def check_page_bytes(maps: Sequence[PageMap], layout: KvLayout, *, rank: int, world_size: int, block_size: int) -> None:
    """Raise AssertionError unless the rank's pages are as large as the maps say.

    Else a layer would divide its heads in another way than is known here.
    """
    for group, page_map in zip(layout.groups, maps, strict=True):
        actual = layout.page_bytes(group, block_size)
        expected = page_map.page_bytes(rank, world_size, block_size)
        if actual != expected:
            raise AssertionError(f"{group.kind} pages have {actual} bytes on rank {rank}, not {expected}")
