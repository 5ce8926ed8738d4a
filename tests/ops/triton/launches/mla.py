"""Latent attention: dims of DeepSeek-V3, over bfloat16 and over eight bits, and float32."""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache, Rotation
from atom_cluster.ops.mla import LatentNorm, MlaDims
from atom_cluster.ops.triton import mla


def attend(
    rows: list[tuple[int, int]],
    *,
    num_heads: int = 128,
    nope_dim: int = 128,
    value_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    stored: torch.dtype | None = None,
    num_selected: int | None = None,
) -> None:
    starts = [0]
    for _, num_new in rows:
        starts.append(starts[-1] + num_new)
    num_tokens = starts[-1]
    metadata = AttentionMetadata(
        block_size=16,
        num_decode_rows=0,
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor([length for length, _ in rows], dtype=torch.int32),
        block_table=torch.zeros(len(rows), 256, dtype=torch.int32),
        slot=torch.zeros(num_tokens, dtype=torch.int64),
        query_start_cpu=tuple(starts),
        context_len_cpu=tuple(length for length, _ in rows),
    )
    dims = MlaDims(num_heads=num_heads, latent_dim=512, nope_dim=nope_dim, rope_dim=64, value_dim=value_dim)
    memory = torch.zeros(2, 3, 16, 1, 576, dtype=stored or dtype)
    kv = KvLayerCache(memory[:, 1], memory[:, 1, ..., :0])
    query, rope = torch.empty(num_tokens, num_heads, nope_dim + 64, dtype=dtype).split([nope_dim, 64], -1)
    latent, key = torch.empty(num_tokens, 576, dtype=dtype).split([512, 64], -1)
    plan = mla.plan_mla(metadata, dims)
    norm, angles = LatentNorm(torch.empty(512, dtype=dtype), 1e-6), torch.empty(num_tokens, 1, 64)
    plan.store(latent, key, rope, kv, norm=norm, rotation=Rotation(angles, angles), is_interleaved=True)
    weights = mla.prepare_latent_weights(
        torch.empty(num_heads, nope_dim + value_dim, 512, dtype=dtype), dims, dtype=dtype
    )
    selected = None if num_selected is None else torch.empty(num_tokens, num_selected, dtype=torch.int32)
    plan.attend(query, rope, weights, kv, scale=0.1, selected_TK=selected)


LAUNCHES = {
    "decode": lambda: attend([(2000, 1)] * 2),
    "decode_eight_bits": lambda: attend([(2000, 1)] * 2, stored=torch.float8_e4m3fn),
    "drafts_sixteen_heads": lambda: attend([(2000, 4)] * 2, num_heads=16),
    "sparse": lambda: attend([(3000, 1)] * 2, num_selected=2048),
    "float32": lambda: attend([(2000, 1), (40, 40)], num_heads=4, dtype=torch.float32),
    "prompt": lambda: attend([(40, 40)], num_heads=8),
    "prompt_wide_heads": lambda: attend([(40, 40)], num_heads=8, nope_dim=192, value_dim=256),
}
