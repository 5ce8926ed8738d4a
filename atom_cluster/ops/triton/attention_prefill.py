"""Attention of rows with many queries: a program has a tile of them and walks all keys that they see.

Not for captured steps: tiles are listed on the host. Keys and values are read from pages, cached or new alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.attention_tile import (
    LOG2_E,
    LOWEST,
    attend_keys,
    entry_offsets,
    load_pages,
    load_queries,
    with_sink,
)
from atom_cluster.ops.triton.repeated import RepeatedKernel
from atom_cluster.ops.triton.runtime import varying


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the kernel is cut for some dims and dtypes."""

    tile: int
    """Queries times heads of one program."""
    keys: int
    """Per iteration."""
    num_warps: int
    num_stages: int


def prefill_config(dim: int, value_dim: int, dtype: torch.dtype) -> PrefillConfig:
    """By what fits into registers and shared memory."""
    widest = triton.next_power_of_2(max(dim, value_dim))
    if runtime.INTERPRETED:
        return PrefillConfig(tile=128, keys=128, num_warps=4, num_stages=1)
    if dtype == torch.float32:
        return PrefillConfig(tile=32, keys=32, num_warps=4, num_stages=1)
    if widest > 256:
        return PrefillConfig(tile=64, keys=32, num_warps=8, num_stages=1)
    if runtime.is_hip():
        return PrefillConfig(
            tile=128, keys=64 if widest <= 128 else 32, num_warps=4 if widest <= 128 else 8, num_stages=1
        )
    if widest > 128:
        return PrefillConfig(tile=128, keys=64, num_warps=8, num_stages=2)
    # Two programs of a multiprocessor hide each other's starts and ends: as fast as larger cuts for long prompts, and a
    # quarter faster for those of 1000 tokens.
    return PrefillConfig(tile=128, keys=32, num_warps=4, num_stages=4)


class TiledAttention:
    """Some rows of a step, for layers with some number of heads."""

    def __init__(
        self, metadata: AttentionMetadata, *, rows: Sequence[int], heads_per_kv: int, config: PrefillConfig
    ) -> None:
        self._metadata, self._heads_per_kv, self._config = metadata, heads_per_kv, config
        self._tile_I2 = list_tiles(metadata, rows, config.tile, heads_per_kv)
        self._kernel = RepeatedKernel(_prefill_kernel)

    def attend(
        self,
        query_THD: torch.Tensor,
        kv: KvLayerCache,
        out_THV: torch.Tensor,
        *,
        scale: float,
        sink_H: torch.Tensor | None,
    ) -> None:
        """Fill in the rows' part of `out_THV`."""
        num_kv_heads, value_dim = kv.value.shape[2:]
        if not len(self._tile_I2):
            return
        metadata, config = self._metadata, self._config
        self._kernel.launch(
            len(self._tile_I2) * num_kv_heads,
            (
                query_THD,
                kv.key,
                kv.value,
                out_THV,
                metadata.block_table,
                self._tile_I2,
                metadata.query_start,
                metadata.context_len,
                query_THD if sink_H is None else sink_H,
            ),
            (
                scale * kv.key_scale * LOG2_E.value,
                float(kv.value_scale),
                num_kv_heads,
                *query_THD.stride()[:2],
                *kv.key.stride()[:3],
                *kv.value.stride()[:3],
                metadata.block_table.stride(0),
            ),
            {
                "BLOCK_SIZE": metadata.block_size,
                "D": query_THD.shape[-1],
                "VALUE_D": value_dim,
                "BLOCK_D": max(16, triton.next_power_of_2(query_THD.shape[-1])),
                "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
                "GROUP": self._heads_per_kv,
                "TILE": config.tile,
                "KEYS": config.keys,
                "WINDOW": metadata.window or 0,
                "HAS_SINK": sink_H is not None,
            },
            {"num_warps": config.num_warps, "num_stages": config.num_stages},
        )


def list_tiles(metadata: AttentionMetadata, rows: Sequence[int], size: int, heads_per_kv: int) -> torch.Tensor:
    """(row, tile of the row) for all tiles of so many queries times heads of a key/value head: int32 [I, 2].

    Those that see most come first, so that the last programs to start are short.
    """
    starts, found = metadata.query_start_cpu, []
    for row in rows:
        num_queries = starts[row + 1] - starts[row]
        num_cached = metadata.context_len_cpu[row] - num_queries
        for tile in range(triton.cdiv(num_queries * heads_per_kv, size)):
            last = min(num_queries, triton.cdiv((tile + 1) * size, heads_per_kv))
            num_keys = num_cached + last
            found.append((num_keys if metadata.window is None else min(num_keys, metadata.window), row, tile))
    found.sort(key=lambda entry: -entry[0])
    packed = torch.tensor([(row, tile) for _, row, tile in found], dtype=torch.int32).view(-1, 2)
    device = metadata.context_len.device
    return packed if device.type == "cpu" else packed.pin_memory().to(device, non_blocking=True)


@triton.jit(**varying("query_start_ptr", "context_len_ptr", "table_stride"))
def _prefill_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    table_ptr,
    tile_ptr,
    query_start_ptr,
    context_len_ptr,
    sink_ptr,
    scale,
    value_scale,
    num_kv_heads,
    query_token_stride,
    query_head_stride,
    key_page_stride,
    key_entry_stride,
    key_head_stride,
    value_page_stride,
    value_entry_stride,
    value_head_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """One program: one tile of queries of one key/value head."""
    kv_head = tl.program_id(0) % num_kv_heads
    item = tl.program_id(0) // num_kv_heads
    row = tl.load(tile_ptr + item * 2)
    first_m = tl.load(tile_ptr + item * 2 + 1) * TILE
    query_start = tl.load(query_start_ptr + row)
    num_queries = tl.load(query_start_ptr + row + 1) - query_start
    context_len = tl.load(context_len_ptr + row)
    num_cached = context_len - num_queries

    m = first_m + tl.arange(0, TILE)
    index = m // GROUP
    head = kv_head * GROUP + m % GROUP
    is_query = index < num_queries
    query = load_queries(
        query_ptr, query_token_stride, query_head_stride, query_start + index, head, is_query, D, BLOCK_D
    )
    query_position = num_cached + index
    key_ptr += kv_head * key_head_stride
    value_ptr += kv_head * value_head_stride
    table_ptr += row.to(tl.int64) * table_stride
    acc = tl.zeros([TILE, BLOCK_V], tl.float32)
    highest = tl.full([TILE], LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)

    # All queries see the keys from `inner` to `inner_end`: only before and behind scores are masked.
    first_position = num_cached + first_m // GROUP
    last_position = tl.minimum(num_cached + (first_m + TILE - 1) // GROUP, context_len - 1)
    end = last_position + 1
    inner_end = first_position + 1
    first_key = 0
    inner = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_position - WINDOW + 1, 0)
        inner = tl.maximum(last_position - WINDOW + 1, 0)
    next_page = load_pages(table_ptr, first_key + tl.arange(0, KEYS), end, BLOCK_SIZE)
    for start in range(first_key, end, KEYS):
        position = start + tl.arange(0, KEYS)
        page = next_page
        next_page = load_pages(table_ptr, position + KEYS, end, BLOCK_SIZE)
        acc, highest, total = attend_keys(
            query,
            acc,
            highest,
            total,
            position,
            position < end,
            query_position,
            key_ptr,
            value_ptr,
            entry_offsets(page, position, key_page_stride, key_entry_stride, BLOCK_SIZE),
            entry_offsets(page, position, value_page_stride, value_entry_stride, BLOCK_SIZE),
            scale,
            D,
            VALUE_D,
            BLOCK_D,
            BLOCK_V,
            WINDOW,
            is_masked=(start < inner) | (start + KEYS > inner_end),
        )

    dim = tl.arange(0, BLOCK_V)
    mean = with_sink(acc, highest, total, sink_ptr, head, is_query, HAS_SINK) * value_scale
    out = ((query_start + index).to(tl.int64) * num_kv_heads * GROUP + head) * VALUE_D
    tl.store(out_ptr + out[:, None] + dim[None, :], mean, is_query[:, None] & (dim < VALUE_D)[None, :])
