"""Attention over paged KV by our kernels: which rows go where. Knows no kernels' insides.

Rows with few queries come first in a step; their keys are split over programs, in launches that can be captured. The
rows from the first with many queries on are cut into tiles of queries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from atom_cluster.ops.attention import AttentionMetadata, AttentionPlan, HeadNorms, KvLayerCache, Rotation
from atom_cluster.ops.triton import attention_decode_hopper, attention_prefill_hopper, attention_store
from atom_cluster.ops.triton.attention_decode import SplitAttention
from atom_cluster.ops.triton.attention_decode_hopper import HopperSplitAttention
from atom_cluster.ops.triton.attention_prefill import TiledAttention, prefill_config
from atom_cluster.ops.triton.attention_prefill_hopper import HopperTiledAttention

MAX_SPLIT_QUERIES = 17
"""Queries of rows whose keys are split: as many as a row that decodes can have, its newest token and its drafts."""


class TritonAttention:
    """Attention of one step."""

    def __init__(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata
        starts = metadata.query_start_cpu
        counts = [end - start for start, end in zip(starts, starts[1:])]
        many = (row for row, count in enumerate(counts) if count > MAX_SPLIT_QUERIES)
        self._num_split_rows = next(many, len(counts))
        self._max_split_queries = max(counts[: self._num_split_rows], default=0)
        self._long_rows = range(self._num_split_rows, len(counts))
        self._split: dict[object, SplitAttention | HopperSplitAttention] = {}
        self._tiled: dict[object, list[TiledAttention | HopperTiledAttention]] = {}

    def store(
        self,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        kv: KvLayerCache,
        *,
        norms: HeadNorms | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """Norm and rotate queries and keys, and write keys and values to their slots."""
        return attention_store.store(
            query_THD,
            key_TKD,
            value_TKD,
            kv,
            self._metadata.slot,
            block_size=self._metadata.block_size,
            norms=norms,
            rotation=rotation,
        )

    def attend(
        self, query_THD: torch.Tensor, kv: KvLayerCache, *, scale: float, sink_H: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal attention of the step's queries over their rows' KV."""
        num_tokens, num_heads, dim = query_THD.shape
        num_kv_heads, value_dim = kv.value.shape[2:]
        out_THV = torch.empty(num_tokens, num_heads, value_dim, dtype=query_THD.dtype, device=query_THD.device)
        key: tuple[object, ...] = (num_heads, num_kv_heads, dim, value_dim, kv.key.dtype)
        if self._max_split_queries:
            if key not in self._split:
                self._split[key] = self._make_split(query_THD, kv)
            self._split[key].attend(query_THD, kv, out_THV, scale=scale, sink_H=sink_H)
        if self._long_rows:
            is_fit = attention_prefill_hopper.is_fit(query_THD, kv, self._metadata)
            key = (*key, is_fit)
            if key not in self._tiled:
                self._tiled[key] = list(self._make_tiled(query_THD, kv, is_fit=is_fit))
            for tiled in self._tiled[key]:
                tiled.attend(query_THD, kv, out_THV, scale=scale, sink_H=sink_H)
        return out_THV

    def _make_split(self, query_THD: torch.Tensor, kv: KvLayerCache) -> SplitAttention | HopperSplitAttention:
        num_heads, dim = query_THD.shape[1:]
        num_kv_heads, value_dim = kv.value.shape[2:]
        group = num_heads // num_kv_heads
        num_queries = self._max_split_queries * group
        if attention_decode_hopper.is_fit(query_THD, kv, block_size=self._metadata.block_size, num_queries=num_queries):
            return HopperSplitAttention(
                self._metadata,
                num_rows=self._num_split_rows,
                max_queries=self._max_split_queries,
                heads_per_kv=group,
                num_kv_heads=num_kv_heads,
                config=attention_decode_hopper.hopper_decode_config(
                    dim,
                    kv.key.dtype,
                    num_queries=num_queries,
                    num_works=self._num_split_rows * num_kv_heads,
                    device=query_THD.device,
                ),
            )
        return SplitAttention(
            self._metadata,
            num_rows=self._num_split_rows,
            max_queries=self._max_split_queries,
            heads_per_kv=group,
            num_kv_heads=num_kv_heads,
            dim=dim,
            value_dim=value_dim,
            dtype=query_THD.dtype,
        )

    def _make_tiled(
        self, query_THD: torch.Tensor, kv: KvLayerCache, *, is_fit: bool
    ) -> Iterator[TiledAttention | HopperTiledAttention]:
        """is_fit: whether Hopper's kernel can be used; which rows are its is decided row by row."""
        metadata, dim, value_dim = self._metadata, query_THD.shape[-1], kv.value.shape[-1]
        group = query_THD.shape[1] // kv.key.shape[2]
        keys = metadata.context_len_cpu
        fast = [
            row
            for row in self._long_rows
            if is_fit and attention_prefill_hopper.is_faster(keys[row], metadata.window, dim)
        ]
        if fast:
            yield HopperTiledAttention(metadata, rows=fast, heads_per_kv=group)
        if rest := sorted(set(self._long_rows).difference(fast)):
            config = prefill_config(dim, value_dim, query_THD.dtype)
            yield TiledAttention(metadata, rows=rest, heads_per_kv=group, config=config)


def plan_attention(metadata: AttentionMetadata) -> AttentionPlan:
    """The plan of one step."""
    return TritonAttention(metadata)
