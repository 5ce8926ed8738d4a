"""Speed of the sparse index and of attention to what it selects, on a GPU: python -m benchmarks.ops.sparse

Dims of DeepSeek-V3.2: 64 index heads of 128 dims, 2048 positions selected, 128 heads of latent attention.
"""

from __future__ import annotations

import argparse

import torch

from atom_cluster.ops.attention import KvLayerCache
from atom_cluster.ops.triton import mla, sparse_index
from benchmarks.ops.mla import NOPE, ROPE, VALUE, make_step
from benchmarks.ops.timing import share_of_bandwidth, time_us

INDEX_HEADS, INDEX_DIM, NUM_SELECTED = 64, 128, 2048

STEPS = [(1, 8192, 1), (1, 65536, 1), (32, 8192, 1), (128, 8192, 1), (32, 65536, 1), (1, 4096, 4096), (1, 32768, 2048)]
"""(rows, context, queries of a row)"""


def time_index(rows: int, context: int, queries: int) -> str:
    """One line."""
    step = make_step(1, rows, context, queries)
    num_pages, num_tokens = int(step.metadata.block_table.max()) + 1, rows * queries
    layers = torch.randn(num_pages, 4, 16, 1, INDEX_DIM, device="cuda", dtype=torch.bfloat16)
    caches = [KvLayerCache(layers[:, layer], layers[:, layer, ..., :0]) for layer in range(4)]
    query_TJD = torch.randn(num_tokens, INDEX_HEADS, INDEX_DIM, device="cuda", dtype=torch.bfloat16)
    weight_TJ = torch.randn(num_tokens, INDEX_HEADS, device="cuda")
    plan = sparse_index.plan_index(step.metadata)
    calls = [lambda kv=kv: plan.select(query_TJD, weight_TJ, kv, num_selected=NUM_SELECTED) for kv in caches]
    us = time_us(calls, num_replays=3, graph_ms=0.5)
    pairs = rows * (queries * context - queries * (queries - 1) / 2)
    flops = 2 * pairs * INDEX_HEADS * INDEX_DIM
    rate = share_of_bandwidth(rows * context * INDEX_DIM * 2, us)
    what = f"index  {rows:4} rows {context:6} tokens {queries:5} queries"
    return f"{what} {us:9.1f} us {flops / us / 1e6:5.0f} TFLOP/s {rate}"


def time_attention(rows: int, context: int, queries: int) -> str:
    """One line."""
    step = make_step(128, rows, context, queries)
    num_tokens = rows * queries
    up = torch.randn(128, NOPE + VALUE, 512, device="cuda", dtype=torch.bfloat16) * 0.05
    weights = mla.prepare_latent_weights(up, step.dims, dtype=torch.bfloat16)
    plan = mla.plan_mla(step.metadata, step.dims)
    selected_TK = torch.rand(num_tokens, context, device="cuda").topk(NUM_SELECTED).indices.int()
    # What no token sees yet is not selected.
    first = context - queries
    seen_T = torch.arange(first, context, device="cuda").repeat(rows) + 1
    selected_TK = torch.minimum(selected_TK, (seen_T - 1)[:, None]).int()
    query_THN, rope_THP = step.query_THD.split([NOPE, ROPE], dim=-1)
    calls = [
        lambda kv=kv: plan.attend(query_THN, rope_THP, weights, kv, scale=0.1, selected_TK=selected_TK)
        for kv in step.caches
    ]
    us = time_us(calls, num_replays=3, graph_ms=0.5)
    flops = 2.0 * int(seen_T.clamp(max=NUM_SELECTED).sum()) * 128 * (2 * 512 + 64)
    return f"attend {rows:4} rows {context:6} tokens {queries:5} queries {us:9.1f} us {flops / us / 1e6:5.0f} TFLOP/s"


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with torch.inference_mode():
        for step in STEPS:
            print(time_index(*step), flush=True)
        for step in STEPS:
            print(time_attention(*step), flush=True)


if __name__ == "__main__":
    main()
