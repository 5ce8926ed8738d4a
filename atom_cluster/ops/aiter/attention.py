"""Paged attention by AITER: rows with one query by its decode kernel, others by its prefill kernel over pages.

Both read our page layout, [N, block_size, K, D] with any stride over pages. Keys and values are written by the backend
that this one stands before, which norms, rotates and stores in one kernel, and with angles in float32; it also attends
where AITER has no kernel: windows and sinks in decoding, eight-bit memory, other head dims and block sizes.

Shape suffixes: T tokens of the step, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from functools import cached_property

import torch

from atom_cluster.ops.aiter.binding import HALF_DTYPES, AiterFunction
from atom_cluster.ops.aiter.rows import PageList, decode_rows, list_pages, other_rows
from atom_cluster.ops.attention import (
    AttentionMetadata,
    AttentionPlan,
    HeadNorms,
    KvLayerCache,
    PlanAttention,
    Rotation,
)
from atom_cluster.units import MiB, ceil_div

DECODE = AiterFunction(
    "aiter.ops.attention",
    "paged_attention_v1",
    "out",
    "workspace_buffer",
    "query",
    "key_cache",
    "value_cache",
    "scale",
    "block_tables",
    "cu_query_lens",
    "context_lens",
    "max_context_len",
    "alibi_slopes",
    "kv_cache_dtype",
    "kv_cache_layout",
    "logits_soft_cap",
    "k_scale",
    "v_scale",
)
PREFILL = AiterFunction(
    "aiter.ops.mha",
    "mha_batch_prefill_func",
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "kv_indptr",
    "kv_page_indices",
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "causal",
    "window_size",
    "kv_last_page_lens",
    "sink_size",
)
"""Versions without `sink_size` (before 0.1.14) compute addresses of pages in 32 bits; ours are further apart."""
FUNCTIONS = (DECODE, PREFILL)

DECODE_HEAD_DIMS, PREFILL_HEAD_DIMS = (64, 128), (128, 256)
DECODE_BLOCK_SIZES, PREFILL_BLOCK_SIZES = (16, 32), (16, 1024)
"""What AITER tests its kernels with."""
MAX_QUERIES_PER_KEY = 16
"""Query heads to a key/value head, in decoding."""
PARTITION_SIZE = 256
"""Positions that a block of the decode kernel attends to."""
WORKSPACE_LIMIT = 256 * MiB
"""The decode kernel keeps partial results for the longest context that the host thinks possible, of every row. Beyond
this much the step goes to the backend behind."""


class AiterAttention:
    """Attention of one step."""

    def __init__(self, metadata: AttentionMetadata, fallback: PlanAttention) -> None:
        self._metadata = metadata
        self._plan_fallback = fallback
        self._fallback = fallback(metadata)
        self._decode, self._other = decode_rows(metadata), other_rows(metadata)
        self._workspace: torch.Tensor | None = None

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
        """Norm and rotate queries and keys, and write keys and values: by the backend behind."""
        return self._fallback.store(query_THD, key_TKD, value_TKD, kv, norms=norms, rotation=rotation)

    def attend(
        self, query_THD: torch.Tensor, kv: KvLayerCache, *, scale: float, sink_H: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal attention of the step's queries over their rows' KV."""
        decodes = self._decode is not None and self._can_decode(query_THD, kv, sink_H)
        prefills = self._other is not None and self._can_prefill(query_THD, kv, sink_H)
        if not decodes and not prefills:
            return self._fallback.attend(query_THD, kv, scale=scale, sink_H=sink_H)
        num_decoded = self._metadata.num_decode_rows
        output_THD = torch.empty_like(query_THD, memory_format=torch.contiguous_format)
        if self._decode is not None:
            tokens = slice(0, num_decoded)
            if decodes:
                self._attend_decode(output_THD[tokens], query_THD[tokens], kv, self._decode, scale)
            else:
                plan = self._decode_fallback
                output_THD[tokens] = plan.attend(query_THD[tokens], kv, scale=scale, sink_H=sink_H)
        if self._other is not None:
            tokens = slice(num_decoded, None)
            if prefills:
                output_THD[tokens] = self._attend_prefill(query_THD[tokens], kv, self._other, scale)
            else:
                plan = self._other_fallback
                output_THD[tokens] = plan.attend(query_THD[tokens], kv, scale=scale, sink_H=sink_H)
        return output_THD

    def _can_attend(self, query_THD: torch.Tensor, kv: KvLayerCache, sink_H: torch.Tensor | None) -> bool:
        is_half = query_THD.dtype in HALF_DTYPES and kv.key.dtype == kv.value.dtype == query_THD.dtype
        has_scales = kv.key_scale != 1.0 or kv.value_scale != 1.0
        return is_half and not has_scales and kv.value.shape[-1] == query_THD.shape[-1] and sink_H is None

    def _can_decode(self, query_THD: torch.Tensor, kv: KvLayerCache, sink_H: torch.Tensor | None) -> bool:
        metadata, num_heads = self._metadata, query_THD.shape[1]
        # One set of strides is for both.
        has_same_strides = kv.key.stride() == kv.value.stride()
        return (
            self._can_attend(query_THD, kv, sink_H)
            and has_same_strides
            and metadata.window is None
            and query_THD.shape[-1] in DECODE_HEAD_DIMS
            and metadata.block_size in DECODE_BLOCK_SIZES
            and num_heads // kv.key.shape[2] <= MAX_QUERIES_PER_KEY
            and self._workspace_bytes(query_THD) <= WORKSPACE_LIMIT
        )

    def _can_prefill(self, query_THD: torch.Tensor, kv: KvLayerCache, sink_H: torch.Tensor | None) -> bool:
        has_known_sizes = query_THD.shape[-1] in PREFILL_HEAD_DIMS and self._metadata.block_size in PREFILL_BLOCK_SIZES
        return has_known_sizes and self._can_attend(query_THD, kv, sink_H)

    def _attend_decode(
        self,
        output_RHD: torch.Tensor,
        query_RHD: torch.Tensor,
        kv: KvLayerCache,
        rows: AttentionMetadata,
        scale: float,
    ) -> None:
        if self._workspace is None:
            num_bytes = self._workspace_bytes(query_RHD)
            self._workspace = torch.empty(num_bytes, dtype=torch.uint8, device=query_RHD.device)
        DECODE(
            out=output_RHD,
            workspace_buffer=self._workspace,
            query=query_RHD if query_RHD.stride(1) == query_RHD.shape[2] else query_RHD.contiguous(),
            key_cache=kv.key,
            value_cache=kv.value,
            scale=scale,
            block_tables=rows.block_table.contiguous(),
            cu_query_lens=None,
            context_lens=rows.context_len,
            max_context_len=self._max_context_len,
            alibi_slopes=None,
            kv_cache_dtype="auto",
            kv_cache_layout="NHD",
            logits_soft_cap=0.0,
            k_scale=self._one,
            v_scale=self._one,
        )

    def _attend_prefill(
        self, query_THD: torch.Tensor, kv: KvLayerCache, rows: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        starts = rows.query_start_cpu
        output_THD: torch.Tensor = PREFILL(
            q=query_THD,
            k=kv.key,
            v=kv.value,
            cu_seqlens_q=rows.query_start.contiguous(),
            kv_indptr=self._pages.start,
            kv_page_indices=self._pages.page,
            max_seqlen_q=max(end - start for start, end in zip(starts, starts[1:])),
            max_seqlen_k=max(rows.context_len_cpu),
            softmax_scale=scale,
            causal=True,
            window_size=(-1 if rows.window is None else rows.window - 1, 0),
            kv_last_page_lens=self._pages.last_len,
            sink_size=0,
        )
        return output_THD

    @cached_property
    def _pages(self) -> PageList:
        """Of the rows with several queries."""
        assert self._other is not None, "no rows with several queries"
        return list_pages(self._other)

    @cached_property
    def _decode_fallback(self) -> AttentionPlan:
        return self._fallback_for(self._decode)

    @cached_property
    def _other_fallback(self) -> AttentionPlan:
        return self._fallback_for(self._other)

    def _fallback_for(self, rows: AttentionMetadata | None) -> AttentionPlan:
        assert rows is not None, "no rows of this kind"
        return self._plan_fallback(rows)

    @cached_property
    def _one(self) -> torch.Tensor:
        """The scale of unscaled memory."""
        return torch.ones(1, dtype=torch.float32, device=self._metadata.context_len.device)

    @cached_property
    def _max_context_len(self) -> int:
        """Of rows with one query, as far as the host knows, and at most what the block table has room for."""
        longest = max(self._metadata.context_len_cpu[: self._metadata.num_decode_rows])
        return min(longest, self._metadata.block_table.shape[1] * self._metadata.block_size)

    def _workspace_bytes(self, query_THD: torch.Tensor) -> int:
        """Of a partial output in the query's dtype, a maximum and a sum, for each row, head and partition."""
        num_heads, head_dim = query_THD.shape[1:]
        num_partials = self._metadata.num_decode_rows * num_heads * ceil_div(self._max_context_len, PARTITION_SIZE)
        return num_partials * (head_dim * query_THD.dtype.itemsize + 2 * torch.float32.itemsize)


def attention_planner(fallback: PlanAttention) -> PlanAttention:
    """Plans that attend by AITER where it has kernels, and by `fallback` where it has not."""

    def plan_attention(metadata: AttentionMetadata) -> AttentionPlan:
        return AiterAttention(metadata, fallback)

    return plan_attention
