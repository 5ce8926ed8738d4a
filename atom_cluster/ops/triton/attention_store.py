"""What comes between a projection and attention, as one kernel: norms, rotation, and keys and values to their slots.

Knows no rows and no block tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.attention import HeadNorms, KvLayerCache, Rotation
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying

PROGRAM_ELEMENTS = 1024
"""Numbers that one program reads: enough for its loads to be in flight together."""


def store(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    value_TKD: torch.Tensor,
    kv: KvLayerCache,
    slot_T: torch.Tensor,
    *,
    block_size: int,
    norms: HeadNorms | None,
    rotation: Rotation | None,
) -> torch.Tensor:
    """See `ops.attention.AttentionPlan.store`. Queries that nothing changes are returned as they came."""
    num_tokens, num_heads, dim = query_THD.shape
    value_dim = value_TKD.shape[-1]
    is_turned = norms is not None or rotation is not None
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device) if is_turned else query_THD
    half = 0 if rotation is None else rotation.cos_T1P.shape[-1] // 2
    widest = triton.next_power_of_2(max(dim, value_dim))
    heads = max(1, min(PROGRAM_ELEMENTS // widest, triton.next_power_of_2(num_heads)))
    num_key_parts = triton.cdiv(key_TKD.shape[1], heads)
    num_query_parts = triton.cdiv(num_heads, heads) if is_turned else 0
    num_parts = num_query_parts + num_key_parts + (num_key_parts if value_dim else 0)
    if not num_tokens:
        return out_THD
    _store_kernel[(num_tokens, num_parts)](
        query_THD,
        key_TKD,
        value_TKD,
        out_THD,
        kv.key,
        kv.value,
        slot_T,
        query_THD if rotation is None else rotation.cos_T1P,
        query_THD if rotation is None else rotation.sin_T1P,
        query_THD if norms is None else norms.query_D,
        query_THD if norms is None else norms.key_D,
        0.0 if norms is None else norms.eps,
        float(kv.key_scale),
        float(kv.value_scale),
        num_heads,
        key_TKD.shape[1],
        num_query_parts,
        *query_THD.stride()[:2],
        *key_TKD.stride()[:2],
        *value_TKD.stride()[:2],
        *kv.key.stride()[:3],
        *kv.value.stride()[:3],
        0 if rotation is None else rotation.cos_T1P.stride(0),
        0 if rotation is None else rotation.sin_T1P.stride(0),
        BLOCK_SIZE=block_size,
        D=dim,
        VALUE_D=value_dim,
        VALUE_BLOCK=triton.next_power_of_2(max(value_dim, 1)),
        HALF=half,
        HALF_BLOCK=triton.next_power_of_2(half) if half else 0,
        REST_BLOCK=triton.next_power_of_2(dim - 2 * half) if dim > 2 * half else 0,
        HEADS=heads,
        HAS_NORM=norms is not None,
        ROUNDS_NORMALISED=norms is not None and norms.query_D.dtype == query_THD.dtype,
        LIMIT=torch.finfo(kv.key.dtype).max if kv.key.dtype.itemsize == 1 else 0.0,
        num_warps=4,
        **launch_options(),
    )
    return out_THD


@triton.jit(**varying("slot_ptr"))
def _store_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    cache_key_ptr,
    cache_value_ptr,
    slot_ptr,
    cos_ptr,
    sin_ptr,
    query_weight_ptr,
    key_weight_ptr,
    eps,
    key_scale,
    value_scale,
    num_heads,
    num_kv_heads,
    num_query_parts,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    cache_key_page_stride,
    cache_key_entry_stride,
    cache_key_head_stride,
    cache_value_page_stride,
    cache_value_entry_stride,
    cache_value_head_stride,
    cos_stride,
    sin_stride,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    VALUE_D: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROUNDS_NORMALISED: tl.constexpr,
    LIMIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: some heads of one token, of queries, keys or values."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_key_parts = tl.cdiv(num_kv_heads, HEADS)
    cos_ptr += token * cos_stride
    sin_ptr += token * sin_stride
    if part < num_query_parts:
        _turn_heads(
            query_ptr + token * query_token_stride,
            query_head_stride,
            out_ptr + token * num_heads * D,
            D,
            part * HEADS,
            num_heads,
            query_weight_ptr,
            cos_ptr,
            sin_ptr,
            eps,
            1.0,
            D,
            HALF,
            HALF_BLOCK,
            REST_BLOCK,
            HEADS,
            HAS_NORM,
            ROUNDS_NORMALISED,
            0.0,
        )
    else:
        slot = tl.load(slot_ptr + token, eviction_policy="evict_last")
        page = slot // BLOCK_SIZE
        entry = slot % BLOCK_SIZE
        if part < num_query_parts + num_key_parts:
            _turn_heads(
                key_ptr + token * key_token_stride,
                key_head_stride,
                cache_key_ptr + page * cache_key_page_stride + entry * cache_key_entry_stride,
                cache_key_head_stride,
                (part - num_query_parts) * HEADS,
                num_kv_heads,
                key_weight_ptr,
                cos_ptr,
                sin_ptr,
                eps,
                key_scale,
                D,
                HALF,
                HALF_BLOCK,
                REST_BLOCK,
                HEADS,
                HAS_NORM,
                ROUNDS_NORMALISED,
                LIMIT,
            )
        else:
            head = (part - num_query_parts - num_key_parts) * HEADS + tl.arange(0, HEADS)
            dim = tl.arange(0, VALUE_BLOCK)
            is_inside = (head < num_kv_heads)[:, None] & (dim < VALUE_D)[None, :]
            value_ptr += token * value_token_stride
            cache_value_ptr += page * cache_value_page_stride + entry * cache_value_entry_stride
            value = tl.load(value_ptr + (head * value_head_stride)[:, None] + dim[None, :], is_inside, other=0.0)
            target = cache_value_ptr + (head * cache_value_head_stride)[:, None] + dim[None, :]
            _store_scaled(target, value.to(tl.float32), is_inside, value_scale, LIMIT)


@triton.jit
def _turn_heads(
    in_ptr,
    in_head_stride,
    out_ptr,
    out_head_stride,
    first_head,
    num_heads,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    scale,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROUNDS_NORMALISED: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Norm and rotate some heads of a token: the two halves of the rotated dims, and the dims behind them."""
    dtype: tl.constexpr = in_ptr.dtype.element_ty
    head = first_head + tl.arange(0, HEADS)
    is_head = (head < num_heads)[:, None]
    in_ptrs = in_ptr + (head * in_head_stride)[:, None]
    out_ptrs = out_ptr + (head * out_head_stride)[:, None]
    squares = tl.zeros([HEADS], tl.float32)
    if HALF > 0:
        pair = tl.arange(0, HALF_BLOCK)
        is_pair = pair < HALF
        is_turned = is_head & is_pair[None, :]
        x = tl.load(in_ptrs + pair[None, :], is_turned, other=0.0).to(tl.float32)
        y = tl.load(in_ptrs + HALF + pair[None, :], is_turned, other=0.0).to(tl.float32)
        squares += tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)
    if REST_BLOCK > 0:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)
        is_rest = rest < D
        is_passed = is_head & is_rest[None, :]
        z = tl.load(in_ptrs + rest[None, :], is_passed, other=0.0).to(tl.float32)
        squares += tl.sum(z * z, axis=1)
    if HAS_NORM:
        factor = tl.rsqrt(squares / D + eps)[:, None]
    if HALF > 0:
        if HAS_NORM:
            x = _weighted(x * factor, tl.load(weight_ptr + pair, is_pair, other=0.0), dtype, ROUNDS_NORMALISED)
            y = _weighted(y * factor, tl.load(weight_ptr + HALF + pair, is_pair, other=0.0), dtype, ROUNDS_NORMALISED)
        # The sines' first half is negated: the second is what the contract's formula takes as it is.
        # Every layer reads them: they had better survive the weights that are read in between.
        cos = tl.load(cos_ptr + pair, is_pair, other=0.0, eviction_policy="evict_last")[None, :]
        sin = tl.load(sin_ptr + HALF + pair, is_pair, other=0.0, eviction_policy="evict_last")[None, :]
        turned_x = (x * cos - y * sin).to(dtype).to(tl.float32)
        turned_y = (y * cos + x * sin).to(dtype).to(tl.float32)
        _store_scaled(out_ptrs + pair[None, :], turned_x, is_turned, scale, LIMIT)
        _store_scaled(out_ptrs + HALF + pair[None, :], turned_y, is_turned, scale, LIMIT)
    if REST_BLOCK > 0:
        if HAS_NORM:
            z = _weighted(z * factor, tl.load(weight_ptr + rest, is_rest, other=0.0), dtype, ROUNDS_NORMALISED)
        _store_scaled(out_ptrs + rest[None, :], z, is_passed, scale, LIMIT)


@triton.jit
def _weighted(normalised, weight, dtype: tl.constexpr, ROUNDS_NORMALISED: tl.constexpr):
    """The product, rounded as `ops.norm` says."""
    if ROUNDS_NORMALISED:
        normalised = normalised.to(dtype).to(tl.float32)
    return (normalised * weight.to(tl.float32)[None, :]).to(dtype).to(tl.float32)


@triton.jit
def _store_scaled(ptrs, x, is_inside, scale, LIMIT: tl.constexpr):
    """x / scale in the memory's dtype: saturated in eight bits."""
    x = x / scale
    if LIMIT > 0:
        x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    tl.store(ptrs, x.to(ptrs.dtype.element_ty), is_inside)
