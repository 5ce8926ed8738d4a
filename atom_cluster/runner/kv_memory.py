"""KV memory of one rank: one allocation per cache group, page-major, with strided views per layer.

A page of a group holds what all its layers keep: keys then values of one layer after the other for a block of tokens,
or one state of each layer. So a page is one contiguous piece of memory, which is what transports move, and each layer
sees [N, entries per page, heads, dim] or [N, *state]. Knows nothing of who uses a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_cache.layout import CacheGroup, KvLayout, StateLayerLayout
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.shared_memory import allocate_shared
from atom_cluster.layers.forward_batch import KvLayerCache, LayerCache, StateLayerCache


@dataclass(frozen=True, slots=True, kw_only=True)
class KvMemory:
    """Allocated KV memory; freed when the last tensor over it is. Starts zeroed, so that stale values are finite."""

    regions: tuple[KvRegion, ...]
    """Per cache group, in order of the groups, [num_pages, bytes per page] uint8; what KV transports export. The spare
    page behind them is not part of it."""
    layers: tuple[LayerCache, ...]
    """Views for each layer of the layout."""
    choice: str
    """Which kind of memory it is and why, for the start-up log."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all groups, spare pages included."""
        return sum(region.blocks.nbytes + region.blocks.stride(0) for region in self.regions)


def allocate_kv_memory(
    layout: KvLayout, *, num_pages: Sequence[int], block_size: int, device: torch.device
) -> KvMemory:
    """Memory for `num_pages[g]` pages of group g, and a spare one behind them.

    On CPUs peers of the same host can map it, if the system lets us.
    """
    regions = []
    views: dict[int, dict[str, torch.Tensor]] = {index: {} for index in range(len(layout.layers))}
    choice = ""
    for index, (group, count) in enumerate(zip(layout.groups, num_pages, strict=True)):
        page_bytes = layout.page_bytes(group, block_size)
        flat, choice = _allocate((count + 1) * page_bytes, device)
        pages = flat.view(count + 1, page_bytes)
        regions.append(KvRegion(_region_name(index, group), pages[:count]))
        offset = 0
        for tensor in layout.page_tensors(group, block_size):
            end = offset + tensor.num_bytes
            typed = pages[:, offset:end].view(getattr(torch, tensor.dtype))
            views[tensor.layer][tensor.name] = typed.view(count + 1, *tensor.shape)
            offset = end
    layers: list[LayerCache] = []
    for layer, own in zip(layout.layers, views.values(), strict=True):
        is_state = isinstance(layer, StateLayerLayout)
        layers.append(StateLayerCache(own) if is_state else KvLayerCache(own["key"], own["value"]))
    return KvMemory(regions=tuple(regions), layers=tuple(layers), choice=choice)


def _allocate(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, str]:
    """Zeroed bytes, and what kind of memory they are in."""
    if device.type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device), f"device memory on {device}"
    try:
        return allocate_shared(num_bytes), "shared memory: processes of this host can read it in place"
    except TransferError as exc:
        return torch.zeros(num_bytes, dtype=torch.uint8), f"private memory: {exc}"


def _region_name(index: int, group: CacheGroup) -> str:
    """Tells the groups of two engines apart that must not read from each other."""
    return f"{index} {group.kind}" if group.window is None else f"{index} {group.kind} {group.window}"
