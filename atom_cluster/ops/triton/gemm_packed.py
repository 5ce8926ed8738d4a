"""Products of plain inputs with codes of four or eight bits, which become floats in registers. Knows no tuning.

Tokens are the rows of the matrix units here and outputs their columns: floats made of codes go to shared memory once,
and nothing is moved code by code. Cut like `gemm` otherwise. Shape suffixes: T tokens, I inputs, O outputs, G groups of
inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.triton.codes import PackedWeight, bfloat16_numbers, load_scale, numbers
from atom_cluster.ops.triton.gemm import GemmBlocks
from atom_cluster.ops.triton.programmatic import (
    LINE_BYTES,
    LINES_AHEAD,
    fetch_ahead,
    launch_options,
    let_next_start,
    wait_for_inputs,
)
from atom_cluster.ops.triton.runtime import varying
from atom_cluster.ops.triton.split import add_up, workspace

_DEQUANTIZED_ROWS, _DEQUANTIZED_COLUMNS = 32, 128


def gemm_packed(
    x_TI: torch.Tensor,
    weight: PackedWeight,
    bias_O: torch.Tensor | None,
    out_TO: torch.Tensor,
    counters: torch.Tensor,
    blocks: GemmBlocks,
) -> None:
    """out = x @ weight.T + bias. `blocks.inputs` is not looked at. See `gemm` for `counters`."""
    num_tokens, num_in = x_TI.shape
    num_out = weight.num_out
    tiles_T, tiles_O = triton.cdiv(num_tokens, blocks.tokens), triton.cdiv(num_out, blocks.outputs)
    splits = blocks.splits if tiles_T * tiles_O <= counters.numel() else 1
    partial = workspace(splits, num_tokens, num_out, x_TI.device)
    _gemm_packed_kernel[(tiles_T, tiles_O, splits)](
        x_TI,
        weight.codes,
        weight.scale_GO,
        weight.scale_GO if weight.zero_GO is None else weight.zero_GO,
        out_TO if bias_O is None else bias_O,
        out_TO,
        out_TO if partial is None else partial,
        counters,
        num_tokens,
        num_out,
        num_in,
        len(weight.scale_GO),
        x_TI.stride(0),
        weight.codes.stride(0),
        out_TO.stride(0),
        KIND=weight.kind,
        GROUP_I=weight.group_or_all,
        CHUNK=weight.chunk,
        SCALES_SUMS=weight.chunk == weight.run and weight.has_exact_zero and weight.scale_GO.dtype != torch.uint8,
        HAS_ZERO=weight.zero_GO is not None,
        IN_FOURS=weight.becomes_bfloat16_in_fours(x_TI.dtype),
        HAS_BIAS=bias_O is not None,
        IS_EVEN=num_in % (weight.step * splits) == 0,
        SPLITS=splits,
        BLOCK_T=blocks.tokens,
        BLOCK_O=blocks.outputs,
        RUN=weight.run,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **launch_options(),
    )


def dequantize_packed(weight: PackedWeight, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of some outputs: [rows, I] of `dtype`."""
    num_rows = rows.stop - rows.start
    out_OI = torch.empty(num_rows, weight.num_in, dtype=dtype, device=weight.codes.device)
    columns = max(1, _DEQUANTIZED_COLUMNS // weight.step)
    grid = (triton.cdiv(weight.num_in, columns * weight.step), triton.cdiv(num_rows, _DEQUANTIZED_ROWS))
    _dequantize_kernel[grid](
        weight.codes,
        weight.scale_GO,
        weight.scale_GO if weight.zero_GO is None else weight.zero_GO,
        out_OI,
        rows.start,
        rows.stop,
        weight.num_out,
        weight.num_in,
        len(weight.scale_GO),
        weight.codes.stride(0),
        KIND=weight.kind,
        GROUP_I=weight.group_or_all,
        CHUNK=weight.chunk,
        HAS_ZERO=weight.zero_GO is not None,
        RUN=weight.run,
        TURNS=columns,
        BLOCK_O=_DEQUANTIZED_ROWS,
        num_warps=4,
    )
    return out_OI


@triton.jit(**varying("num_tokens"))
def _gemm_packed_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    num_tokens,
    num_out,
    num_in,
    num_groups,
    x_stride,
    codes_stride,
    out_stride,
    KIND: tl.constexpr,
    GROUP_I: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IN_FOURS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    RUN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """SCALES_SUMS: codes less zero points are multiplied, exactly, and the sums scaled; else weights are scaled."""
    PER_BYTE: tl.constexpr = 1 if KIND == 2 else 2
    STEP: tl.constexpr = RUN * PER_BYTE
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    real_output = tl.minimum(output, num_out - 1)
    is_token = token < num_tokens
    turns = tl.cdiv(tl.cdiv(num_in, STEP), SPLITS)
    first = tl.program_id(2) * turns * STEP
    last = tl.minimum(first + turns * STEP, num_in)
    column = tl.arange(0, RUN)
    chunk = tl.arange(0, RUN // CHUNK)
    codes_ptrs = codes_ptr + real_output.to(tl.int64)[:, None] * codes_stride + column[None, :]
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * x_stride + column[None, :]
    if BLOCK_T <= 64:
        line = tl.arange(0, LINES_AHEAD) * (LINE_BYTES // (codes_ptr.dtype.element_ty.primitive_bitwidth // 8))
        ahead = tl.minimum(first // PER_BYTE + line, codes_stride - 1)
        fetch_ahead(codes_ptr + real_output.to(tl.int64)[:, None] * codes_stride + ahead[None, :], OVERLAPS)
    wait_for_inputs(OVERLAPS)
    total = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for start in range(first, last, STEP):
        if KIND == 2 and not IS_EVEN:
            codes = tl.load(codes_ptrs + start, (start + column < num_in)[None, :], other=0.0)
        else:
            codes = tl.load(codes_ptrs + start // PER_BYTE, eviction_policy="evict_first")
        products = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
        for half in tl.static_range(PER_BYTE):
            begin = start + half * RUN
            if IS_EVEN:
                x = tl.load(x_ptrs + begin, is_token[:, None], other=0.0)
            else:
                x = tl.load(x_ptrs + begin, is_token[:, None] & (begin + column < num_in)[None, :], other=0.0)
            group = tl.minimum((begin + chunk * CHUNK) // GROUP_I, num_groups - 1)
            place = group.to(tl.int64)[None, :] * num_out + real_output[:, None]
            weight = bfloat16_numbers(codes, half, KIND) if IN_FOURS else numbers(codes, half, KIND, DTYPE)
            weight = tl.reshape(weight, [BLOCK_O, RUN // CHUNK, CHUNK])
            scale = load_scale(scale_ptr + place)
            if HAS_ZERO:
                zero = tl.load(zero_ptr + place)
                if SCALES_SUMS:
                    weight -= zero.to(DTYPE)[:, :, None]
                else:
                    weight = weight.to(tl.float32) - zero.to(tl.float32)[:, :, None]
            if not SCALES_SUMS and not HAS_ZERO and scale_ptr.dtype.element_ty == tl.uint8:
                # Powers of two lose nothing.
                weight = weight * scale.to(DTYPE)[:, :, None]
            elif not SCALES_SUMS:
                weight = (weight.to(tl.float32) * scale[:, :, None]).to(DTYPE)
            weight = tl.trans(tl.reshape(weight, [BLOCK_O, RUN]))
            if SCALES_SUMS and GROUP_I % STEP == 0:
                products = _dot(x, weight, products)
            elif SCALES_SUMS:
                # One chunk is the run.
                total += _dot(x, weight, products) * tl.sum(scale, 1)[None, :]
            else:
                total = _dot(x, weight, total)
        if SCALES_SUMS and GROUP_I % STEP == 0:
            total += products * tl.sum(scale, 1)[None, :]
    let_next_start(OVERLAPS)
    place = token.to(tl.int64)[:, None]
    is_inside = (output < num_out)[None, :] & is_token[:, None]
    if SPLITS > 1:
        places = place * num_out + output[None, :]
        total, is_last = add_up(total, places, is_inside, partial_ptr, counter_ptr, num_tokens, num_out, SPLITS)
        is_inside = is_inside & is_last
    if HAS_BIAS:
        total += tl.load(bias_ptr + real_output).to(tl.float32)[None, :]
    tl.store(out_ptr + place * out_stride + output[None, :], total.to(out_ptr.dtype.element_ty), is_inside)


@triton.jit
def _dot(x, weight, total):
    if x.dtype == tl.float32:
        return tl.dot(x, weight, total, input_precision="ieee")
    return tl.dot(x, weight, total)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    first_row,
    last_row,
    num_out,
    num_in,
    num_groups,
    codes_stride,
    KIND: tl.constexpr,
    GROUP_I: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    RUN: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 1 if KIND == 2 else 2
    STEP: tl.constexpr = RUN * PER_BYTE
    output = first_row + tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row = (output < last_row)[:, None]
    real_output = tl.minimum(output, num_out - 1)[:, None]
    column = tl.arange(0, RUN)
    chunk = tl.arange(0, RUN // CHUNK)
    for turn in tl.static_range(TURNS):
        start = (tl.program_id(0) * TURNS + turn) * STEP
        place = output.to(tl.int64)[:, None] * codes_stride + start // PER_BYTE + column[None, :]
        if KIND == 2:
            codes = tl.load(codes_ptr + place, is_row & (start + column < num_in)[None, :], other=0.0)
        else:
            codes = tl.load(codes_ptr + place, is_row & (start < num_in), other=0)
        for half in tl.static_range(PER_BYTE):
            begin = start + half * RUN
            group = tl.minimum((begin + chunk * CHUNK) // GROUP_I, num_groups - 1)
            of_group = group.to(tl.int64)[None, :] * num_out + real_output
            weight = tl.reshape(numbers(codes, half, KIND, tl.float32), [BLOCK_O, RUN // CHUNK, CHUNK])
            if HAS_ZERO:
                weight -= tl.load(zero_ptr + of_group).to(tl.float32)[:, :, None]
            weight = tl.reshape(weight * load_scale(scale_ptr + of_group)[:, :, None], [BLOCK_O, RUN])
            inputs = begin + column
            out_ptrs = out_ptr + (output - first_row).to(tl.int64)[:, None] * num_in + inputs[None, :]
            tl.store(out_ptrs, weight.to(out_ptr.dtype.element_ty), is_row & (inputs < num_in)[None, :])
