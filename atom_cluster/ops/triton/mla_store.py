"""What comes between a projection and latent attention, as one kernel: norm, rotation, and what is cached to its slot.

Knows no rows and no block tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import KvLayerCache, Rotation
from atom_cluster.ops.mla import LatentNorm
from atom_cluster.ops.triton.paged_store import store_scaled
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying

PROGRAM_ELEMENTS = 1024
"""Numbers that one program reads: enough for its loads to be in flight together."""


def store(
    latent_TL: torch.Tensor,
    key_TP: torch.Tensor,
    query_THP: torch.Tensor,
    kv: KvLayerCache,
    slot_T: torch.Tensor,
    *,
    block_size: int,
    norm: LatentNorm,
    rotation: Rotation,
    is_interleaved: bool,
) -> torch.Tensor:
    """See `ops.mla.MlaPlan.store`. Queries are rotated where they are."""
    num_tokens, num_heads, rope_dim = query_THP.shape
    latent_dim = latent_TL.shape[-1]
    half_block = triton.next_power_of_2(rope_dim // 2)
    heads = max(1, min(PROGRAM_ELEMENTS // (2 * half_block), triton.next_power_of_2(num_heads)))
    if num_tokens:
        _store_kernel[(num_tokens, 1 + triton.cdiv(num_heads, heads))](
            latent_TL,
            key_TP,
            query_THP,
            kv.key,
            slot_T,
            norm.weight_L,
            rotation.cos_T1P,
            rotation.sin_T1P,
            norm.eps,
            float(kv.key_scale),
            num_heads,
            latent_TL.stride(0),
            key_TP.stride(0),
            *query_THP.stride()[:2],
            *kv.key.stride()[:2],
            rotation.cos_T1P.stride(0),
            rotation.sin_T1P.stride(0),
            BLOCK_SIZE=block_size,
            L=latent_dim,
            L_BLOCK=triton.next_power_of_2(latent_dim),
            HALF=rope_dim // 2,
            HALF_BLOCK=half_block,
            HEADS=heads,
            IS_INTERLEAVED=is_interleaved,
            ROUNDS_NORMALISED=norm.weight_L.dtype == latent_TL.dtype,
            LIMIT=torch.finfo(kv.key.dtype).max if kv.key.dtype.itemsize == 1 else 0.0,
            num_warps=4,
            **launch_options(),
        )
    return query_THP


@triton.jit(**varying("slot_ptr"))
def _store_kernel(
    latent_ptr,
    key_ptr,
    query_ptr,
    cache_ptr,
    slot_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    scale,
    num_heads,
    latent_stride,
    key_stride,
    query_token_stride,
    query_head_stride,
    page_stride,
    entry_stride,
    cos_stride,
    sin_stride,
    BLOCK_SIZE: tl.constexpr,
    L: tl.constexpr,
    L_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    ROUNDS_NORMALISED: tl.constexpr,
    LIMIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: what is cached of a token, or some of its query heads."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype: tl.constexpr = latent_ptr.dtype.element_ty
    pair = tl.arange(0, HALF_BLOCK)
    is_pair = pair < HALF
    # The sines' first half is negated: the second is what the formula takes as it is.
    cos = tl.load(cos_ptr + token * cos_stride + pair, is_pair, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * sin_stride + HALF + pair, is_pair, other=0.0).to(tl.float32)[None, :]
    if part > 0:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)
        ptrs = query_ptr + token * query_token_stride + (head * query_head_stride)[:, None]
        _rotate(ptrs, ptrs, (head < num_heads)[:, None], cos, sin, 1.0, HALF, HALF_BLOCK, IS_INTERLEAVED, 0.0)
    else:
        slot = tl.load(slot_ptr + token)
        cache_ptr += (slot // BLOCK_SIZE) * page_stride + (slot % BLOCK_SIZE) * entry_stride
        dim = tl.arange(0, L_BLOCK)
        latent = tl.load(latent_ptr + token * latent_stride + dim, dim < L, other=0.0).to(tl.float32)
        latent = latent * tl.rsqrt(tl.sum(latent * latent, axis=0) / L + eps)
        if ROUNDS_NORMALISED:
            latent = latent.to(dtype).to(tl.float32)
        latent = latent * tl.load(weight_ptr + dim, dim < L, other=0.0).to(tl.float32)
        store_scaled(cache_ptr + dim, latent.to(dtype).to(tl.float32), dim < L, scale, LIMIT)
        one = tl.arange(0, 1)[:, None]
        key_ptrs = key_ptr + token * key_stride + one
        _rotate(key_ptrs, cache_ptr + L + one, one == 0, cos, sin, scale, HALF, HALF_BLOCK, IS_INTERLEAVED, LIMIT)


@triton.jit
def _rotate(
    in_ptrs,
    out_ptrs,
    is_head,
    cos,
    sin,
    scale,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Heads as whole vectors: neighbours are told apart in registers."""
    dtype: tl.constexpr = in_ptrs.dtype.element_ty
    if IS_INTERLEAVED:
        dim = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        is_inside = is_head & (dim < 2 * HALF)
        both = tl.load(in_ptrs + dim, is_inside, other=0.0).to(tl.float32)
        x, y = tl.split(tl.reshape(both, [both.shape[0], HALF_BLOCK, 2]))
        turned = tl.reshape(tl.join(x * cos - y * sin, y * cos + x * sin), both.shape)
        store_scaled(out_ptrs + dim, turned.to(dtype).to(tl.float32), is_inside, scale, LIMIT)
    else:
        pair = tl.arange(0, HALF_BLOCK)[None, :]
        is_inside = is_head & (pair < HALF)
        x = tl.load(in_ptrs + pair, is_inside, other=0.0).to(tl.float32)
        y = tl.load(in_ptrs + HALF + pair, is_inside, other=0.0).to(tl.float32)
        store_scaled(out_ptrs + pair, (x * cos - y * sin).to(dtype).to(tl.float32), is_inside, scale, LIMIT)
        store_scaled(out_ptrs + HALF + pair, (y * cos + x * sin).to(dtype).to(tl.float32), is_inside, scale, LIMIT)
