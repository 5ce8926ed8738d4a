"""Attention over paged KV, prefill and decode, and what comes before it."""

from collections.abc import Callable

import torch

from atom_cluster.ops.attention import AttentionMetadata, HeadNorms, KvLayerCache, Rotation
from atom_cluster.ops.triton import plan_attention, runtime
from atom_cluster.ops.triton.rotary import rotary


def attend(
    counts: tuple[int, ...],
    *,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    dim: int = 128,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    is_narrow: bool = False,
    window: int | None = None,
    has_sink: bool = False,
) -> Callable[[], object]:
    """A step of rows with so many new tokens."""
    value_dim = dim if value_dim is None else value_dim

    def launch() -> object:
        stored = dtype
        if is_narrow:
            stored = torch.float8_e4m3fnuz if runtime.arch() == "gfx942" else torch.float8_e4m3fn
        starts = [sum(counts[:row]) for row in range(len(counts) + 1)]
        metadata = AttentionMetadata(
            block_size=16,
            window=window,
            num_decode_rows=counts.count(1),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_len=torch.tensor([1000] * len(counts), dtype=torch.int32),
            block_table=torch.zeros(len(counts), 64, dtype=torch.int32),
            slot=torch.zeros(starts[-1], dtype=torch.int64),
            query_start_cpu=tuple(starts),
            context_len_cpu=(1000,) * len(counts),
        )
        memory = [torch.empty(4, 16, num_kv_heads, size).to(stored) for size in (dim, value_dim)]
        plan = plan_attention(metadata)
        query = torch.empty(starts[-1], num_heads, dim, dtype=dtype)
        sink = torch.empty(num_heads) if has_sink else None
        return plan.attend(query, KvLayerCache(*memory), scale=1.0, sink_H=sink)

    return launch


def store(*, dim: int = 128, rotary_dim: int = 128, has_norms: bool = False, is_narrow: bool = False) -> object:
    """Into the pages, from a fused projection of 32 and 8 heads."""
    stored = torch.bfloat16
    if is_narrow:
        stored = torch.float8_e4m3fnuz if runtime.arch() == "gfx942" else torch.float8_e4m3fn
    metadata = AttentionMetadata(
        block_size=16,
        num_decode_rows=1,
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        context_len=torch.ones(1, dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        slot=torch.zeros(1, dtype=torch.int64),
        query_start_cpu=(0, 1),
        context_len_cpu=(1,),
    )
    heads = torch.empty(1, 48, dim, dtype=torch.bfloat16).split([32, 8, 8], dim=1)
    norms = HeadNorms(*torch.empty(2, dim, dtype=torch.bfloat16), 1e-6) if has_norms else None
    memory = torch.empty(2, 4, 16, 8, dim).to(stored)
    rotation = Rotation(torch.empty(1, 1, rotary_dim), torch.empty(1, 1, rotary_dim))
    return plan_attention(metadata).store(*heads, KvLayerCache(*memory), norms=norms, rotation=rotation)


def turn() -> object:
    """Shared keys of latent attention, in neighbouring pairs."""
    query, key = torch.empty(2, 128, 64, dtype=torch.bfloat16), torch.empty(2, 1, 64, dtype=torch.bfloat16)
    return rotary(query, key, torch.empty(2, 1, 64), torch.empty(2, 1, 64), is_interleaved=True)


LAUNCHES: dict[str, Callable[[], object]] = {
    "decode llama": attend((1, 1)),
    "decode llama, rows": attend((1,) * 8),
    "decode llama drafts fp8": attend((4, 4), is_narrow=True),
    "decode gemma3": attend((1,), num_heads=8, num_kv_heads=4, dim=256, window=1024),
    "decode qwen3-30b fp8": attend((1, 1), num_kv_heads=4, is_narrow=True),
    "decode gpt-oss drafts": attend((4, 4), num_heads=64, dim=64, window=128, has_sink=True),
    "decode mimo": attend((1,), num_heads=64, num_kv_heads=4, dim=192, value_dim=128),
    "decode deepseek-v4 window": attend((1,), num_heads=64, num_kv_heads=1, dim=512, window=128, has_sink=True),
    "decode float32": attend((1,), dtype=torch.float32),
    "prefill llama": attend((100,)),
    "prefill gpt-oss": attend((100,), num_heads=64, dim=64, window=128, has_sink=True),
    "prefill gemma3": attend((100,), num_heads=8, num_kv_heads=4, dim=256, window=512),
    "prefill gemma3 fp8": attend((100,), num_heads=8, num_kv_heads=4, dim=256, is_narrow=True),
    "prefill mimo": attend((100,), num_heads=64, num_kv_heads=4, dim=192, value_dim=128),
    "prefill deepseek-v4 window": attend((100,), num_heads=64, num_kv_heads=1, dim=512, window=128, has_sink=True),
    "prefill float32": attend((100,), dtype=torch.float32),
    "store llama": store,
    "store qwen3 fp8": lambda: store(has_norms=True, is_narrow=True),
    "store qwen3-next": lambda: store(dim=256, rotary_dim=64, has_norms=True),
    "rotary": turn,
}
