"""KV memory of one rank: one allocation, block-major, with a strided view per layer. Knows nothing of who uses a block.

A block holds, for its tokens, keys then values of layer 0, then of layer 1, and so on. So a block is one contiguous
piece of memory, which is what transports move, and each layer sees [N, block_size, heads, dim].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from atom_cluster.errors import ConfigError, TransferError
from atom_cluster.kv_cache.layout import DTYPE_BYTES, KvLayerLayout, KvLayout
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.shared_memory import allocate_shared
from atom_cluster.layers.forward_batch import KvLayerCache
from atom_cluster.units import GiB

MIN_BLOCKS = 2
_REGION_NAME = "kv"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvMemory:
    """Allocated KV memory; freed when the last tensor over it is. Starts zeroed, so that stale values are finite."""

    blocks: torch.Tensor
    """[num_blocks, elements per block]"""
    layers: tuple[KvLayerCache, ...]
    choice: str
    """Which kind of memory it is and why, for the start-up log."""

    @property
    def regions(self) -> tuple[KvRegion, ...]:
        """What KV transports export."""
        return (KvRegion(_REGION_NAME, self.blocks),)


def allocate_kv_memory(layout: KvLayout, *, num_blocks: int, block_size: int, device: torch.device) -> KvMemory:
    """Memory for `num_blocks` blocks. On CPUs peers of the same host can map it, if the system lets us."""
    dtype = torch.uint8
    num_bytes = num_blocks * layout.page_bytes(layout.groups[0], block_size)
    if device.type != "cpu":
        flat = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        choice = f"device memory on {device}"
    else:
        try:
            flat = allocate_shared(num_bytes).view(dtype)
            choice = "shared memory: processes of this host can read it in place"
        except TransferError as exc:
            flat = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype)
            choice = f"private memory: {exc}"
    blocks = flat.view(num_blocks, -1)
    return KvMemory(blocks=blocks, layers=_layer_views(blocks, layout, block_size), choice=choice)


def blocks_that_fit(layout: KvLayout, *, block_size: int, budget_bytes: int) -> int:
    """Blocks that `budget_bytes` holds. Raises ConfigError when that is too few to run anything."""
    num_blocks = budget_bytes // layout.page_bytes(layout.groups[0], block_size)
    if num_blocks < MIN_BLOCKS:
        raise ConfigError(
            f"{budget_bytes / GiB:.3f} GiB are left for the KV cache, less than {MIN_BLOCKS} blocks of "
            f"{layout.page_bytes(layout.groups[0], block_size)} bytes: raise cache.cpu_cache_gib or memory_fraction, "
            "or lower cache.block_size or scheduler.max_num_batched_tokens"
        )
    return num_blocks


def _layer_views(blocks: torch.Tensor, layout: KvLayout, block_size: int) -> tuple[KvLayerCache, ...]:
    views = []
    offset = 0
    for layer in layout.layers:
        assert isinstance(layer, KvLayerLayout)
        item = DTYPE_BYTES[layer.dtype]
        tensors = []
        for dim in (layer.key_dim, layer.value_dim):
            shape = (block_size, layer.num_kv_heads, dim)
            end = offset + math.prod(shape) * item
            tensors.append(blocks[:, offset:end].view(getattr(torch, layer.dtype)).view(-1, *shape))
            offset = end
        views.append(KvLayerCache(*tensors))
    return tuple(views)
