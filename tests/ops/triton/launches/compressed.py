"""Compression, and attention to a window and entries: dims of DeepSeek-V4."""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.triton import compressed_attention, compression


def metadata_of(num_tokens: int, window: int | None) -> AttentionMetadata:
    return AttentionMetadata(
        block_size=16,
        window=window,
        num_decode_rows=0,
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_len=torch.tensor([16384], dtype=torch.int32),
        block_table=torch.zeros(1, 1024, dtype=torch.int32),
        slot=torch.zeros(num_tokens, dtype=torch.int64),
        query_start_cpu=(0, num_tokens),
        context_len_cpu=(16384,),
    )


def cache(size: int, dim: int, dtype: torch.dtype) -> KvLayerCache:
    memory = torch.zeros(2, 3, size, 1, dim, dtype=dtype)
    return KvLayerCache(memory[:, 1], memory[:, 1])


def compress(num_series: int, tokens_per_entry: int, dtype: torch.dtype = torch.bfloat16) -> None:
    width = 512 * num_series
    plan = compression.plan_compression(
        metadata_of(300, num_series * tokens_per_entry),
        metadata_of(300, None),
        tokens_per_entry=tokens_per_entry,
        num_series=num_series,
    )
    value, gate = torch.empty(300, 2 * width, dtype=dtype).chunk(2, dim=-1)
    entry = plan.pool(value, gate, torch.empty(num_series * tokens_per_entry, 512), cache(16, width, dtype))
    plan.store(entry, cache(max(1, 16 // tokens_per_entry), 512, dtype))


def attend(
    num_tokens: int,
    *,
    num_selected: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    stored: torch.dtype | None = None,
) -> None:
    plan = compressed_attention.plan_compressed_attention(
        metadata_of(num_tokens, 128), metadata_of(num_tokens, None), tokens_per_entry=4
    )
    tokens, entries = cache(16, 512, stored or dtype), cache(4, 512, stored or dtype)
    selected = None if num_selected is None else torch.empty(num_tokens, num_selected, dtype=torch.int32)
    query = torch.empty(num_tokens, 64, 512, dtype=dtype)
    plan.attend(query, tokens, entries, scale=0.1, sink_H=torch.empty(64), selected_TK=selected)


LAUNCHES = {
    "pool_series": lambda: compress(2, 4),
    "pool_many": lambda: compress(1, 128),
    "attend_selected": lambda: attend(1, num_selected=512),
    "attend_all": lambda: attend(300),
    "attend_eight_bits": lambda: attend(300, num_selected=512, stored=torch.float8_e4m3fn),
    "attend_float32": lambda: attend(1, num_selected=512, dtype=torch.float32),
}
