"""One vector per token to its slot of paged memory. Knows no rows and no block tables."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import KvLayerCache
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying

PROGRAM_ELEMENTS = 2048


def store_entries(key_TD: torch.Tensor, kv: KvLayerCache, slot_T: torch.Tensor, *, block_size: int) -> None:
    """Write `key_TD`, whose tokens may be strided, to `kv.key` [N, block_size, 1, D]."""
    num_tokens, dim = key_TD.shape
    dim_block = triton.next_power_of_2(dim)
    tokens = max(1, min(PROGRAM_ELEMENTS // dim_block, triton.next_power_of_2(num_tokens)))
    if num_tokens:
        _store_kernel[(triton.cdiv(num_tokens, tokens),)](
            key_TD,
            kv.key,
            slot_T,
            float(kv.key_scale),
            num_tokens,
            key_TD.stride(0),
            *kv.key.stride()[:2],
            BLOCK_SIZE=block_size,
            D=dim,
            D_BLOCK=dim_block,
            TOKENS=tokens,
            LIMIT=torch.finfo(kv.key.dtype).max if kv.key.dtype.itemsize == 1 else 0.0,
            num_warps=4,
            **launch_options(),
        )


@triton.jit(**varying("slot_ptr", "num_tokens"))
def _store_kernel(
    key_ptr,
    cache_ptr,
    slot_ptr,
    scale,
    num_tokens,
    key_stride,
    page_stride,
    entry_stride,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    LIMIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: some tokens."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    dim = tl.arange(0, D_BLOCK)[None, :]
    is_inside = (token < num_tokens)[:, None] & (dim < D)
    slot = tl.load(slot_ptr + token, token < num_tokens, other=0)
    key = tl.load(key_ptr + (token.to(tl.int64) * key_stride)[:, None] + dim, is_inside, other=0.0).to(tl.float32)
    place = (slot // BLOCK_SIZE) * page_stride + (slot % BLOCK_SIZE) * entry_stride
    store_scaled(cache_ptr + place[:, None] + dim, key, is_inside, scale, LIMIT)


@triton.jit
def store_scaled(ptrs, x, is_inside, scale, LIMIT: tl.constexpr):
    """x / scale in the memory's dtype: saturated in eight bits."""
    x = x / scale
    if LIMIT > 0:
        x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    tl.store(ptrs, x.to(ptrs.dtype.element_ty), is_inside)
