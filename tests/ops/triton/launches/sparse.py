"""The sparse index: dims of DeepSeek-V3.2, over bfloat16 and over eight bits, of decodes and of a prompt."""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.triton import sparse_index


def select(
    num_tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    stored: torch.dtype | None = None,
    tokens_per_entry: int = 1,
) -> None:
    metadata = AttentionMetadata(
        block_size=16,
        num_decode_rows=0,
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_len=torch.tensor([16384], dtype=torch.int32),
        block_table=torch.zeros(1, 1024, dtype=torch.int32),
        slot=torch.zeros(num_tokens, dtype=torch.int64),
        query_start_cpu=(0, num_tokens),
        context_len_cpu=(16384,),
    )
    memory = torch.zeros(2, 3, 16 // tokens_per_entry, 1, 128, dtype=stored or dtype)
    kv = KvLayerCache(memory[:, 1], memory[:, 1, ..., :0])
    plan = sparse_index.plan_index(metadata, tokens_per_entry=tokens_per_entry)
    plan.store(torch.empty(num_tokens, 128, dtype=dtype), kv)
    query, weight = torch.empty(num_tokens, 64, 128, dtype=dtype), torch.empty(num_tokens, 64)
    plan.select(query, weight, kv, num_selected=2048)


LAUNCHES = {
    "decode": lambda: select(1),
    "prompt": lambda: select(1000),
    "eight_bits": lambda: select(1, stored=torch.float8_e4m3fn),
    "entries": lambda: select(1, tokens_per_entry=4),
    "float32": lambda: select(1, dtype=torch.float32),
}
