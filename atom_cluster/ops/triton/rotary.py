"""Rotary position embedding, in place and in one launch. Knows no layers and no caches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs


def rotary(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    cos_T1P: torch.Tensor,
    sin_T1P: torch.Tensor,
    *,
    is_interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.rotary.Rotary`. The results are the inputs, overwritten."""
    num_tokens, num_heads, _ = query_THD.shape
    num_kv_heads, half = key_TKD.shape[1], cos_T1P.shape[-1] // 2
    block = triton.next_power_of_2(half)
    heads = max(1, min(1024 // block, triton.next_power_of_2(max(num_heads, num_kv_heads))))
    num_parts = triton.cdiv(num_heads, heads) + triton.cdiv(num_kv_heads, heads)
    if num_tokens and num_parts and half:
        _rotary_kernel[(num_tokens, num_parts)](
            query_THD,
            key_TKD,
            cos_T1P,
            sin_T1P,
            num_heads,
            num_kv_heads,
            *query_THD.stride(),
            *key_TKD.stride(),
            cos_T1P.stride(0),
            sin_T1P.stride(0),
            HALF=half,
            HALF_BLOCK=block,
            HEADS=heads,
            IS_INTERLEAVED=is_interleaved,
            num_warps=4,
            **launch_options(),
        )
    return query_THD, key_TKD


@triton.jit
def _rotary_kernel(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    num_heads,
    num_kv_heads,
    query_token_stride,
    query_head_stride,
    query_dim_stride,
    key_token_stride,
    key_head_stride,
    key_dim_stride,
    cos_stride,
    sin_stride,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: some heads of one token, of queries or of keys."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_query_parts = tl.cdiv(num_heads, HEADS)
    cos_ptr += token * cos_stride
    sin_ptr += token * sin_stride
    if part < num_query_parts:
        _turn(
            query_ptr + token * query_token_stride,
            query_head_stride,
            query_dim_stride,
            part * HEADS,
            num_heads,
            cos_ptr,
            sin_ptr,
            HALF,
            HALF_BLOCK,
            HEADS,
            IS_INTERLEAVED,
        )
    else:
        _turn(
            key_ptr + token * key_token_stride,
            key_head_stride,
            key_dim_stride,
            (part - num_query_parts) * HEADS,
            num_kv_heads,
            cos_ptr,
            sin_ptr,
            HALF,
            HALF_BLOCK,
            HEADS,
            IS_INTERLEAVED,
        )


@triton.jit
def _turn(
    ptr,
    head_stride,
    dim_stride,
    first_head,
    num_heads,
    cos_ptr,
    sin_ptr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    """Some heads of a token, in place."""
    head = first_head + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF_BLOCK)
    is_pair = pair < HALF
    is_inside = (head < num_heads)[:, None] & is_pair[None, :]
    if IS_INTERLEAVED:
        ptr = ptr + (head * head_stride)[:, None] + (pair * 2 * dim_stride)[None, :]
        other = ptr + dim_stride
    else:
        ptr = ptr + (head * head_stride)[:, None] + (pair * dim_stride)[None, :]
        other = ptr + HALF * dim_stride
    # The sines' first half is negated: the second is what the contract's formula takes as it is.
    cos = tl.load(cos_ptr + pair, is_pair, other=0.0)[None, :]
    sin = tl.load(sin_ptr + HALF + pair, is_pair, other=0.0)[None, :]
    x = tl.load(ptr, is_inside, other=0.0).to(tl.float32)
    y = tl.load(other, is_inside, other=0.0).to(tl.float32)
    tl.store(ptr, x * cos - y * sin, is_inside)
    tl.store(other, y * cos + x * sin, is_inside)
