"""Speed of latent attention on a GPU: python -m benchmarks.ops.mla [decode] [prefill]

Dims of DeepSeek-V3. Of decodes, how long attention to the latents takes, with the share of what the chip could reach
(by the larger of the times that reading the latents and computing the products take); and with `+ up`, what the
products with W_K and W_V add. Of prompts, with gathering and expanding, and the rate by the products of attention.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache, Rotation
from atom_cluster.ops.mla import LatentNorm, MlaDims
from atom_cluster.ops.triton import mla
from atom_cluster.units import ceil_div
from benchmarks.ops.timing import BYTES_PER_SECOND, share_of_bandwidth, time_us

BLOCK_SIZE = 16
LATENT, NOPE, ROPE, VALUE = 512, 128, 64, 128
FLOPS_PER_SECOND = {"NVIDIA H200": 7.5e14}
"""Of bfloat16 products, about what large matrix products reach."""

DECODES = [
    (128, rows, context, queries)
    for rows, context, queries in [
        (1, 128, 1), (1, 1024, 1), (1, 8192, 1), (1, 65536, 1), (32, 1024, 1), (32, 4096, 1), (32, 8192, 1),
        (128, 256, 1), (128, 1024, 1), (128, 8192, 1), (32, 4096, 2), (128, 1024, 2),
    ]
] + [(16, 1, 8192, 1), (16, 32, 4096, 1), (16, 128, 1024, 1), (16, 128, 8192, 1), (16, 128, 4096, 4)]  # fmt: skip
"""(heads, rows, context, queries of a row)"""

PREFILLS = [
    (16, 1024, 1024), (4, 4096, 4096), (1, 16384, 16384), (1, 2048, 32768), (1, 112, 1024), (1, 512, 2048),
    (4, 128, 8192), (64, 64, 64),
]  # fmt: skip
"""(rows, queries, context)"""


@dataclass(frozen=True, slots=True)
class Step:
    """Inputs of one step for several layers."""

    metadata: AttentionMetadata
    caches: list[KvLayerCache]
    query_THD: torch.Tensor
    dims: MlaDims


def make_step(num_heads: int, rows: int, context: int, queries: int, dtype: torch.dtype = torch.bfloat16) -> Step:
    """Rows of equal length in scattered pages; as many layers as it takes to be more than caches hold."""
    pages_per_row = ceil_div(context, BLOCK_SIZE)
    num_pages, dim = rows * pages_per_row, LATENT + ROPE
    num_layers = max(2, min(61, ceil_div(200 << 20, num_pages * BLOCK_SIZE * dim * dtype.itemsize)))
    memory = torch.randn(num_pages, num_layers, BLOCK_SIZE, 1, dim, device="cuda", dtype=torch.bfloat16).to(dtype)
    table = torch.randperm(num_pages, device="cuda").int().view(rows, pages_per_row)
    position = torch.arange(context - queries, context, device="cuda")
    slot = table[:, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
    metadata = AttentionMetadata(
        block_size=BLOCK_SIZE,
        num_decode_rows=rows if queries == 1 else 0,
        query_start=torch.arange(0, rows * queries + 1, queries, dtype=torch.int32, device="cuda"),
        context_len=torch.full((rows,), context, dtype=torch.int32, device="cuda"),
        block_table=table,
        slot=slot.flatten(),
        query_start_cpu=tuple(range(0, rows * queries + 1, queries)),
        context_len_cpu=(context,) * rows,
    )
    return Step(
        metadata=metadata,
        caches=[KvLayerCache(memory[:, layer], memory[:, layer, ..., :0]) for layer in range(num_layers)],
        query_THD=torch.randn(rows * queries, num_heads, NOPE + ROPE, device="cuda", dtype=torch.bfloat16),
        dims=MlaDims(num_heads=num_heads, latent_dim=LATENT, nope_dim=NOPE, rope_dim=ROPE, value_dim=VALUE),
    )


def time_decode(num_heads: int, rows: int, context: int, queries: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """One line."""
    step = make_step(num_heads, rows, context, queries, dtype)
    plan = mla.plan_mla(step.metadata, step.dims)
    up = torch.randn(num_heads, NOPE + VALUE, LATENT, device="cuda", dtype=torch.bfloat16) * 0.05
    weights = [mla.prepare_latent_weights(up.clone(), step.dims, dtype=torch.bfloat16) for _ in step.caches[:4]]
    query_THN, rope_THP = step.query_THD.split([NOPE, ROPE], dim=-1)
    query_THL = weights[0].absorb(query_THN).contiguous()

    def attend(kv: KvLayerCache) -> None:
        plan.attend_latents(query_THL, rope_THP, kv, scale=0.1)

    def attend_all(index: int) -> None:
        plan.attend(query_THN, rope_THP, weights[index % len(weights)], step.caches[index], scale=0.1)

    attend_us = time_us([lambda kv=kv: attend(kv) for kv in step.caches])
    all_us = time_us([lambda index=index: attend_all(index) for index in range(len(step.caches))])
    num_bytes = rows * context * (LATENT + ROPE) * dtype.itemsize
    flops = 2.0 * rows * queries * num_heads * context * (2 * LATENT + ROPE)
    name = torch.cuda.get_device_name()
    bound_us = max(num_bytes / BYTES_PER_SECOND.get(name, 4e12), flops / FLOPS_PER_SECOND.get(name, 7e14)) * 1e6
    return (
        f"{num_heads:4} heads {rows:4} rows {context:6} tokens {queries:2} queries {str(dtype)[6:]:14}"
        f" {attend_us:8.1f} us {flops / attend_us / 1e6:5.0f} TFLOP/s {share_of_bandwidth(num_bytes, attend_us)},"
        f" of roof {bound_us / attend_us:4.0%}, + up {all_us - attend_us:6.1f} us"
    )


def time_prefill(rows: int, queries: int, context: int) -> str:
    """One line."""
    num_heads = 128
    step = make_step(num_heads, rows, context, queries)
    plan = mla.plan_mla(step.metadata, step.dims)
    up = torch.randn(num_heads, NOPE + VALUE, LATENT, device="cuda", dtype=torch.bfloat16) * 0.05
    weights = mla.prepare_latent_weights(up, step.dims, dtype=torch.bfloat16)
    query_THN, rope_THP = step.query_THD.split([NOPE, ROPE], dim=-1)
    plan.attend(query_THN, rope_THP, weights, step.caches[0], scale=0.1)
    calls = [lambda kv=kv: plan.attend(query_THN, rope_THP, weights, kv, scale=0.1) for kv in step.caches[:2]]
    us = time_us(calls, num_replays=3, graph_ms=0.1)
    pairs = rows * (queries * context - queries * (queries - 1) / 2)
    flops = 2 * pairs * num_heads * (NOPE + ROPE + VALUE)
    return f"{rows:4} rows {queries:6} queries {context:6} tokens {us:9.1f} us {flops / us / 1e6:5.0f} TFLOP/s"


def time_store(num_tokens: int) -> str:
    """One line."""
    step = make_step(128, num_tokens, 64, 1)
    plan = mla.plan_mla(step.metadata, step.dims)
    norm = LatentNorm(torch.ones(LATENT, device="cuda", dtype=torch.bfloat16), 1e-6)
    angle = torch.randn(num_tokens, 1, ROPE // 2, device="cuda")
    rotation = Rotation(torch.cat((angle.cos(),) * 2, -1), torch.cat((-angle.sin(), angle.sin()), -1))
    latent_TL, key_TP = torch.randn(num_tokens, 2112, device="cuda", dtype=torch.bfloat16)[:, 1536:].split(
        [512, 64], -1
    )

    def store(kv: KvLayerCache) -> None:
        plan.store(latent_TL, key_TP, step.query_THD[..., NOPE:], kv, norm=norm, rotation=rotation, is_interleaved=True)

    us = time_us([lambda kv=kv: store(kv) for kv in step.caches])
    return f"store {num_tokens:6} tokens, 128 heads {us:8.1f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["store", "decode", "prefill"])
    args = parser.parse_args()
    with torch.inference_mode():
        if "store" in args.what:
            for num_tokens in (1, 128, 8192):
                print(time_store(num_tokens), flush=True)
        if "decode" in args.what:
            for decode in DECODES:
                print(time_decode(*decode), flush=True)
            for rows, context in ((1, 8192), (128, 1024), (128, 8192)):
                print(time_decode(128, rows, context, 1, torch.float8_e4m3fn), flush=True)
        if "prefill" in args.what:
            for prefill in PREFILLS:
                print(time_prefill(*prefill), flush=True)


if __name__ == "__main__":
    main()
