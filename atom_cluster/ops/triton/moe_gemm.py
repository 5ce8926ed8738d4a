"""Grouped products of tokens sorted by expert: many rows an expert, or so few that only reading weights counts.

Weights are the left operand, so that few tokens make narrow products rather than empty rows, and so that numbers of
four and eight bits are widened in registers. Shape suffixes: T tokens, N outputs, I intermediate dims; K experts per
token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.moe import ExpertActivation
from atom_cluster.ops.triton.moe_sort import Tiles
from atom_cluster.ops.triton.moe_weights import (
    ExpertMatrix,
    activate,
    final_scale,
    load_codes,
    load_numbers,
    load_per_group,
    scale_value,
)
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Rows that are multiplied: numbers, or codes with a scale per row or per group of a row."""

    values: torch.Tensor
    scale: torch.Tensor | None = None
    """[rows, groups]"""
    group: int = 0
    """Values that share a scale; 0: all of a row."""
    static_scale: torch.Tensor | None = None
    """[E]: values are rounded to the weight's float8 numbers when they are read."""


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """How a product is cut up."""

    block_out: int
    block_in: int
    tiles_together: int
    """Tiles of tokens that are computed side by side, so that they share weights in the cache."""
    num_warps: int
    num_stages: int
    tokens_first: bool = False
    """For products of codes with many rows: their scales per row and group then take few registers."""


def multiply_pairs(
    inputs: Inputs,
    matrix: ExpertMatrix,
    tiles: Tiles,
    config: GemmConfig,
    *,
    activation: ExpertActivation | None,
    num_chosen: int,
    out: torch.Tensor,
) -> None:
    """Each pair's row times its expert's matrix.

    With an activation: inputs are tokens, and out [N, I] gets activated rows in the order of tiles. Without: inputs are
    rows in that order, and out [N, outputs] gets rows where their pairs are.
    """
    size = out.shape[1]
    blocks_out = triton.cdiv(size, config.block_out)
    is_scaled = inputs.scale is not None or inputs.static_scale is not None
    x_scale = inputs.static_scale if inputs.scale is None else inputs.scale
    x_scale = inputs.values if x_scale is None else x_scale
    _multiply_kernel[(tiles.count * blocks_out,)](
        inputs.values,
        x_scale,
        *matrix.arguments(),
        tiles.tile_ptr if tiles.pair_N is None else tiles.pair_N,
        tiles.tile_ptr,
        out,
        matrix.num_experts,
        matrix.num_in,
        size,
        inputs.values.stride(0),
        0 if inputs.scale is None else inputs.scale.stride(0),
        0 if inputs.scale is None or not inputs.group else inputs.scale.stride(1),
        *activation_arguments(activation),
        **matrix.constants(),
        IS_GATED=activation is not None,
        IS_OAI=activation is not None and activation.kind == "swiglu_oai",
        HAS_LIMIT=activation is not None and activation.limit is not None,
        K=num_chosen,
        IS_SCALED=is_scaled,
        IS_STATIC=inputs.static_scale is not None,
        X_GROUP=inputs.group,
        IS_SORTED=tiles.pair_N is not None,
        BLOCK_T=tiles.rows,
        BLOCK_OUT=config.block_out,
        BLOCK_IN=config.block_in,
        TILES_TOGETHER=config.tiles_together,
        IS_EVEN=matrix.num_in % config.block_in == 0,
        TOKENS_FIRST=config.tokens_first and is_scaled,
        IS_ONE_BLOCK=matrix.rows % config.block_out == 0 and size % config.block_out == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(),
    )


def activation_arguments(activation: ExpertActivation | None) -> tuple[float, float]:
    """alpha and limit."""
    if activation is None:
        return 0.0, 0.0
    return activation.alpha, 0.0 if activation.limit is None else activation.limit


@triton.jit
def _add_product(
    sums,
    row_ptr,
    scale,
    zero,
    x,
    x_scale,
    first,
    num_in,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_E8M0: tl.constexpr,
    IS_SCALED: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    IS_EVEN: tl.constexpr,
    TOKENS_FIRST: tl.constexpr,
):
    """sums, [N, T] or [T, N], plus the product of BLOCK_IN inputs, x [BLOCK_IN, T].

    scale, zero: of the weight's groups as they are stored, if it has any. x_scale: of these inputs.
    """
    if IS_SCALED:
        codes = load_codes(row_ptr, first, num_in, KIND, BLOCK_IN, IS_EVEN)
        # A sum of its own for these inputs: float8 units add up in fewer bits than float32 has.
        SUM_DTYPE: tl.constexpr = tl.int32 if KIND == "int8" else tl.float32
        if TOKENS_FIRST:
            product = tl.dot(tl.trans(x), tl.trans(codes), out_dtype=SUM_DTYPE)
        else:
            product = tl.dot(codes, x, out_dtype=SUM_DTYPE)
        factor = x_scale * scale_value(scale, IS_E8M0) if SCALES_SUMS else x_scale
        sums += product.to(tl.float32) * factor
    elif KIND == "float":
        weight = load_codes(row_ptr, first, num_in, KIND, BLOCK_IN, IS_EVEN)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
    else:
        weight = load_numbers(
            row_ptr, scale, zero, first, num_in, x.dtype,
            KIND, GROUP, HAS_ZERO, IS_E8M0, GROUP > 0 and not SCALES_SUMS, BLOCK_IN, IS_EVEN,
        )  # fmt: skip
        if SCALES_SUMS:
            sums += tl.dot(weight, x, input_precision="ieee") * scale_value(scale, IS_E8M0)
        else:
            sums = tl.dot(weight, x, sums, input_precision="ieee")
    return sums


@triton.jit
def _multiply_kernel(
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    stride_expert,
    stride_out,
    stride_scale_expert,
    stride_scale_out,
    stride_scale_group,
    pair_ptr,
    tile_ptr,
    out_ptr,
    num_experts,
    num_in,
    size,
    stride_x,
    stride_x_scale,
    stride_x_scale_group,
    alpha,
    limit,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_E8M0: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_OAI: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    K: tl.constexpr,
    IS_SCALED: tl.constexpr,
    IS_STATIC: tl.constexpr,
    X_GROUP: tl.constexpr,
    IS_SORTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILES_TOGETHER: tl.constexpr,
    IS_EVEN: tl.constexpr,
    TOKENS_FIRST: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    program = tl.program_id(0)
    blocks_out = tl.cdiv(size, BLOCK_OUT)
    within = program % (TILES_TOGETHER * blocks_out)
    tile = program // (TILES_TOGETHER * blocks_out) * TILES_TOGETHER + within % TILES_TOGETHER
    expert = tl.load(tile_ptr + tile * (4 if IS_SORTED else 1)).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        return
    start, stop = tile, tile + 1
    if IS_SORTED:
        start = tl.load(tile_ptr + tile * 4 + 1)
        stop = tl.load(tile_ptr + tile * 4 + 2)
    row = start + tl.arange(0, BLOCK_T)
    is_row = row < stop
    # Columns behind the last row compute the first row's again, which is not stored.
    row = tl.where(is_row, row, start)
    pair = tl.load(pair_ptr + row) if IS_SORTED else row
    source = (pair // K if IS_GATED else row).to(tl.int64)
    first_output = within // TILES_TOGETHER * BLOCK_OUT
    stored_output = first_output + tl.arange(0, BLOCK_OUT)
    output = tl.minimum(stored_output, size - 1)

    codes_ptr += expert * stride_expert
    scale_ptr += expert * stride_scale_expert
    zero_ptr += expert * stride_scale_expert
    gate_ptr = codes_ptr + output[:, None] * stride_out
    block = _block_of(output, first_output, ROWS, IS_ONE_BLOCK, TOKENS_FIRST) * stride_scale_out
    gate_scale, gate_zero = scale_ptr + block, zero_ptr + block
    sums = tl.zeros([BLOCK_T, BLOCK_OUT] if TOKENS_FIRST else [BLOCK_OUT, BLOCK_T], tl.float32)
    if IS_GATED:
        up_ptr = gate_ptr + size * stride_out
        up_block = _block_of(output + size, first_output + size, ROWS, IS_ONE_BLOCK, TOKENS_FIRST) * stride_scale_out
        up_scale, up_zero = scale_ptr + up_block, zero_ptr + up_block
        up_sums = sums
    x_row = x_ptr + source[None, :] * stride_x
    x_scale_row = x_scale_ptr + _across(source, not TOKENS_FIRST) * stride_x_scale
    static_scale = 1.0
    if IS_STATIC:
        static_scale = tl.load(x_scale_ptr + expert)
    # Sums of few rows are cheaper to scale than weights are. Codes cannot be scaled at all.
    SCALES_SUMS: tl.constexpr = GROUP >= BLOCK_IN and (IS_SCALED or BLOCK_T <= 64)
    HAS_SCALES: tl.constexpr = KIND != "float" and GROUP > 0
    # Scales and zero points are loaded a step before they are needed: nothing else would hide how long that takes.
    x_scale, gate_step, up_step, gate_zero_step, up_zero_step = 1.0, 1.0, 1.0, 0.0, 0.0
    if X_GROUP > 0:
        x_scale = tl.load(x_scale_row)
    if HAS_SCALES:
        gate_step = load_per_group(gate_scale, 0, num_in, stride_scale_group, GROUP, BLOCK_IN)
        if IS_GATED:
            up_step = load_per_group(up_scale, 0, num_in, stride_scale_group, GROUP, BLOCK_IN)
    if HAS_ZERO:
        gate_zero_step = load_per_group(gate_zero, 0, num_in, stride_scale_group, GROUP, BLOCK_IN)
        if IS_GATED:
            up_zero_step = load_per_group(up_zero, 0, num_in, stride_scale_group, GROUP, BLOCK_IN)
    for first in range(0, num_in, BLOCK_IN):
        ahead = tl.where(first + BLOCK_IN < num_in, first + BLOCK_IN, first)
        next_x_scale, next_gate_step, next_up_step = x_scale, gate_step, up_step
        next_gate_zero_step, next_up_zero_step = gate_zero_step, up_zero_step
        if X_GROUP > 0:
            next_x_scale = tl.load(x_scale_row + ahead // X_GROUP * stride_x_scale_group)
        if HAS_SCALES:
            next_gate_step = load_per_group(gate_scale, ahead, num_in, stride_scale_group, GROUP, BLOCK_IN)
            if IS_GATED:
                next_up_step = load_per_group(up_scale, ahead, num_in, stride_scale_group, GROUP, BLOCK_IN)
        if HAS_ZERO and GROUP > 0:
            next_gate_zero_step = load_per_group(gate_zero, ahead, num_in, stride_scale_group, GROUP, BLOCK_IN)
            if IS_GATED:
                next_up_zero_step = load_per_group(up_zero, ahead, num_in, stride_scale_group, GROUP, BLOCK_IN)
        column = first + tl.arange(0, BLOCK_IN)[:, None]
        if IS_EVEN:
            x = tl.load(x_row + column)
        else:
            x = tl.load(x_row + column, column < num_in, other=0.0)
        if IS_STATIC:
            x = _to_float8(x, static_scale, codes_ptr.dtype.element_ty)
        sums = _add_product(
            sums, gate_ptr, gate_step, gate_zero_step, x, x_scale, first, num_in,
            KIND, GROUP, HAS_ZERO, IS_E8M0, IS_SCALED, SCALES_SUMS, BLOCK_IN, IS_EVEN, TOKENS_FIRST,
        )  # fmt: skip
        if IS_GATED:
            up_sums = _add_product(
                up_sums, up_ptr, up_step, up_zero_step, x, x_scale, first, num_in,
                KIND, GROUP, HAS_ZERO, IS_E8M0, IS_SCALED, SCALES_SUMS, BLOCK_IN, IS_EVEN, TOKENS_FIRST,
            )  # fmt: skip
        x_scale, gate_step, up_step = next_x_scale, next_gate_step, next_up_step
        gate_zero_step, up_zero_step = next_gate_zero_step, next_up_zero_step

    if IS_SCALED and X_GROUP == 0:
        row_scale = static_scale if IS_STATIC else tl.load(x_scale_row)
        sums *= row_scale
    sums = final_scale(sums, gate_scale, KIND, GROUP, IS_E8M0)
    if HAS_BIAS:
        bias_row = bias_ptr + expert * (2 * size if IS_GATED else size)
        sums += _across(tl.load(bias_row + output).to(tl.float32), TOKENS_FIRST)
    if IS_GATED:
        if IS_SCALED and X_GROUP == 0:
            up_sums *= row_scale
        up_sums = final_scale(up_sums, up_scale, KIND, GROUP, IS_E8M0)
        if HAS_BIAS:
            up_sums += _across(tl.load(bias_row + size + output).to(tl.float32), TOKENS_FIRST)
        sums = activate(sums, up_sums, alpha, limit, IS_OAI, HAS_LIMIT)
    target = (row if IS_GATED else pair).to(tl.int64)
    place = out_ptr + target[:, None] * size + stored_output[None, :]
    is_stored = is_row[:, None] & (stored_output < size)[None, :]
    result = sums.to(out_ptr.dtype.element_ty)
    tl.store(place, result if TOKENS_FIRST else tl.trans(result), is_stored)


@triton.jit
def _across(values, IS_ROW: tl.constexpr):
    """[N] -> [1, N] or [N, 1]"""
    if IS_ROW:
        values = values[None, :]
    else:
        values = values[:, None]
    return values


@triton.jit
def _block_of(output, first_output, ROWS: tl.constexpr, IS_ONE_BLOCK: tl.constexpr, TOKENS_FIRST: tl.constexpr):
    """Which block of outputs each one is in, [N, 1] or [1, N]; one number if it is the same for all."""
    if ROWS == 0:
        block = 0
    elif IS_ONE_BLOCK:
        block = first_output // ROWS
    else:
        block = _across(output // ROWS, TOKENS_FIRST)
    return block


@triton.jit
def _to_float8(x, scale, FLOAT8: tl.constexpr):
    """The codes of x / scale, of which the largest stand for all that is larger."""
    largest: tl.constexpr = 240.0 if tl.float8e4b8 == FLOAT8 else 448.0
    x = tl.div_rn(x.to(tl.float32), scale + tl.zeros(x.shape, tl.float32))
    x = tl.minimum(tl.maximum(x, -largest), largest)
    if _INTERPRETED:
        # The interpreter's conversion drops bits instead of rounding.
        exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)
        step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
        x = ((x / step + 12582912.0) - 12582912.0) * step
    return x.to(FLOAT8)
