"""Rounds inputs of products to eight or four bits in one pass. Knows no products.

Two results: codes and scales for kernels that multiply codes, or the rounded numbers themselves, in the dtype of the
inputs, for kernels that multiply those; the latter is exact where scales are powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.number_formats import largest
from atom_cluster.ops.quantized import InputQuantization
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying

_MAX_BLOCK = 16384
"""Inputs of a token that a program holds at a time."""
_GROUPED_BLOCK = 2048
_KINDS = {"float8": 0, "int8": 1, "float4": 2}
_INTERPRETED = tl.constexpr(runtime.INTERPRETED)
_ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: what is added to it loses its fraction, to the nearest even."""


def quantize_inputs(
    x_TI: torch.Tensor,
    spec: InputQuantization,
    *,
    float8_dtype: torch.dtype = torch.float8_e4m3fn,
    static_scale: torch.Tensor | None = None,
    scales_by_group: bool = False,
    token_multiple: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, I] (float8 or int8) and their scales [T, groups] float32 (of one group when per token or static).

    static_scale: [] float32, for `spec.is_static`; [T, 1] of it are returned without being copied. scales_by_group: the
    scales lie in memory group by group, not token by token. token_multiple: as many more tokens, of any codes and
    scales, are behind the last as make their number a multiple of it.
    """
    assert spec.number in ("float8", "int8"), "float4 has no codes here"
    num_in = x_TI.shape[1]
    num_tokens = triton.cdiv(len(x_TI), token_multiple) * token_multiple
    code_dtype = float8_dtype if spec.number == "float8" else torch.int8
    codes_TI = torch.empty(num_tokens, num_in, dtype=code_dtype, device=x_TI.device)
    if spec.is_static:
        assert static_scale is not None, "static input quantization without a scale"
        scale_TG = static_scale.expand(num_tokens, 1)
        _launch(x_TI, spec, float8_dtype, codes_TI, static_scale, (0, 0))
        return codes_TI, scale_TG
    num_groups = 1 if spec.group_size is None else triton.cdiv(num_in, spec.group_size)
    shape = (num_groups, num_tokens) if scales_by_group else (num_tokens, num_groups)
    scale = torch.empty(shape, dtype=torch.float32, device=x_TI.device)
    scale_TG = scale.T if scales_by_group else scale
    _launch(x_TI, spec, float8_dtype, codes_TI, scale_TG, scale_TG.stride())
    return codes_TI, scale_TG


def round_inputs(
    x_TI: torch.Tensor,
    spec: InputQuantization,
    *,
    float8_dtype: torch.dtype = torch.float8_e4m3fn,
    static_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, I] -> [T, I] in the same dtype: codes times scales, rounded to it."""
    rounded_TI = torch.empty(x_TI.shape, dtype=x_TI.dtype, device=x_TI.device)
    _launch(x_TI, spec, float8_dtype, rounded_TI, static_scale, (0, 0))
    return rounded_TI


def _launch(
    x_TI: torch.Tensor,
    spec: InputQuantization,
    float8_dtype: torch.dtype,
    out_TI: torch.Tensor,
    scale: torch.Tensor | None,
    scale_strides: tuple[int, ...],
) -> None:
    num_tokens, num_in = x_TI.shape
    if num_tokens == 0:
        return
    assert x_TI.stride(1) == 1, "inputs of a token must lie side by side"
    limit = largest(spec.number, float8_dtype)
    common = {
        "num_in": num_in,
        "x_stride": x_TI.stride(0),
        "limit": limit,
        "max_abs": torch.inf if spec.max_abs is None else spec.max_abs,
        "KIND": _KINDS[spec.number],
        "FLOAT8": tl.float8e4b8 if float8_dtype == torch.float8_e4m3fnuz else tl.float8e4nv,
        "IS_CODES": out_TI.dtype != x_TI.dtype,
        "STORES_SCALE": scale is not None and not spec.is_static,
        "IS_STATIC": spec.is_static,
        # The exponent of the power of two that the limit begins with, plus 1.
        "E8M0_LIMIT": {448.0: 9, 240.0: 8, 127.0: 7, 6.0: 3}[limit] if spec.scale_format == "e8m0" else 0,
        **launch_options(),
    }
    tensors = (x_TI, out_TI, x_TI if scale is None else scale)
    if spec.group_size is None and not spec.is_static:
        block = min(_MAX_BLOCK, triton.next_power_of_2(num_in))
        _quantize_tokens_kernel[(num_tokens,)](
            *tensors, scale_strides[0], BLOCK=block, num_warps=max(1, min(16, block // 512)), **common
        )
        return
    group_size = _GROUPED_BLOCK if spec.group_size is None else spec.group_size
    width = triton.next_power_of_2(group_size)
    groups = max(1, _GROUPED_BLOCK // width)
    grid = (num_tokens, triton.cdiv(num_in, groups * group_size))
    _quantize_groups_kernel[grid](
        *tensors, *scale_strides, group_size=group_size, GROUPS=groups, WIDTH=width, num_warps=4, **common
    )


@triton.jit
def _quantize_tokens_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    scale_stride,
    num_in,
    x_stride,
    limit,
    max_abs,
    KIND: tl.constexpr,
    FLOAT8: tl.constexpr,
    IS_CODES: tl.constexpr,
    STORES_SCALE: tl.constexpr,
    IS_STATIC: tl.constexpr,
    E8M0_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A scale per token: a program per token. Tokens longer than a block are read twice."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    x = tl.load(x_ptr + token * x_stride + column, column < num_in, other=0.0).to(tl.float32)
    found = tl.max(tl.abs(x), 0)
    for start in range(BLOCK, num_in, BLOCK):
        more = tl.load(x_ptr + token * x_stride + start + column, start + column < num_in, other=0.0).to(tl.float32)
        found = tl.maximum(found, tl.max(tl.abs(more), 0))
    scale = _scale_of(tl.minimum(found, max_abs), limit, E8M0_LIMIT)
    if STORES_SCALE:
        tl.store(scale_ptr + token * scale_stride, scale)
    _store(out_ptr + token * num_in + column, x, scale, limit, column < num_in, KIND, FLOAT8, IS_CODES)
    for start in range(BLOCK, num_in, BLOCK):
        is_inside = start + column < num_in
        more = tl.load(x_ptr + token * x_stride + start + column, is_inside, other=0.0).to(tl.float32)
        _store(out_ptr + token * num_in + start + column, more, scale, limit, is_inside, KIND, FLOAT8, IS_CODES)


@triton.jit(**varying("scale_group_stride"))
def _quantize_groups_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    scale_token_stride,
    scale_group_stride,
    num_in,
    x_stride,
    limit,
    max_abs,
    group_size,
    KIND: tl.constexpr,
    FLOAT8: tl.constexpr,
    IS_CODES: tl.constexpr,
    STORES_SCALE: tl.constexpr,
    IS_STATIC: tl.constexpr,
    E8M0_LIMIT: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A scale per group of a token's inputs, or one for everything: a program per several groups of a token."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, WIDTH)
    column = group[:, None] * group_size + place[None, :]
    is_inside = (place[None, :] < group_size) & (column < num_in)
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    x = tl.load(x_ptr + token * x_stride + column, is_inside, other=0.0).to(tl.float32)
    if IS_STATIC:
        scale = tl.zeros([GROUPS], tl.float32) + tl.load(scale_ptr)
    else:
        scale = _scale_of(tl.minimum(tl.max(tl.abs(x), 1), max_abs), limit, E8M0_LIMIT)
    if STORES_SCALE:
        place_of_scale = scale_ptr + token * scale_token_stride + group * scale_group_stride
        tl.store(place_of_scale, scale, group * group_size < num_in)
    _store(out_ptr + token * num_in + column, x, scale[:, None], limit, is_inside, KIND, FLOAT8, IS_CODES)


@triton.jit
def _scale_of(max_abs, limit, E8M0_LIMIT: tl.constexpr):
    """As `number_formats.scale_for`. E8M0_LIMIT: the limit's exponent, or 0 for scales of any value."""
    if E8M0_LIMIT == 0:
        scale = tl.div_rn(max_abs, max_abs * 0.0 + limit)
    else:
        bits = max_abs.to(tl.int32, bitcast=True)
        shift = (bits >> 23) - 126 - E8M0_LIMIT + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        shift = tl.minimum(tl.maximum(shift, -127), 127)
        # 2^-127 is below the normal numbers.
        scale = tl.where(shift == -127, 0x400000, (shift + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(max_abs > 0, scale, 1.0)


@triton.jit
def _store(out_ptrs, x, scale, limit, is_inside, KIND: tl.constexpr, FLOAT8: tl.constexpr, IS_CODES: tl.constexpr):
    # Numbers below what float32 can invert are zeros.
    inverse = tl.div_rn(scale * 0.0 + 1.0, scale)
    inverse = tl.where(inverse < float("inf"), inverse, 0.0)
    y = x * inverse
    if KIND == 0:
        rounded = tl.minimum(tl.maximum(y, -limit), limit)
        if _INTERPRETED:
            # The interpreter's conversion drops the lower bits.
            exponent = tl.maximum((rounded.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)
            step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
            rounded = ((rounded / step + _ROUNDER) - _ROUNDER) * step
        rounded = rounded.to(FLOAT8)
    elif KIND == 1:
        rounded = tl.minimum(tl.maximum((y + _ROUNDER) - _ROUNDER, -128.0), 127.0)
    else:
        magnitude = tl.minimum(tl.abs(y), 6.0)
        step = tl.where(magnitude < 2.0, 0.5, tl.where(magnitude < 4.0, 1.0, 2.0))
        nearest = ((magnitude / step + _ROUNDER) - _ROUNDER) * step
        rounded = tl.where(y < 0, -nearest, nearest)
    if IS_CODES:
        tl.store(out_ptrs, rounded.to(out_ptrs.dtype.element_ty), is_inside)
    else:
        tl.store(out_ptrs, (rounded.to(tl.float32) * scale).to(out_ptrs.dtype.element_ty), is_inside)
