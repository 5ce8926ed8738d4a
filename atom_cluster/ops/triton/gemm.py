"""Products with weights whose codes are multiplied as they are: floats, float8 or int8. Knows no tuning.

Made for few tokens, where reading the weights is all: outputs are the rows of the matrix units, tokens their columns,
and when the outputs are few, several programs share them, each with a part of the inputs. The last of them to finish
adds up what all have, always in the same order. Shape suffixes: T tokens, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

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


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmBlocks:
    """How a product is cut."""

    outputs: int
    tokens: int
    inputs: int
    """Read at a time; a divisor of groups that share a scale."""
    splits: int = 1
    """Programs that share outputs."""
    num_warps: int = 4
    num_stages: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """What products of codes are multiplied by."""

    of_tokens_TG: torch.Tensor
    """[T, groups] float32; a group of all inputs, or of `group_in`."""
    of_outputs: torch.Tensor
    """[blocks of outputs, blocks of inputs] float32."""
    group_in: int
    block: tuple[int, int]
    """Outputs and inputs that share a scale."""


def gemm(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    out_TO: torch.Tensor,
    counters: torch.Tensor,
    blocks: GemmBlocks,
    scales: Scales | None = None,
) -> None:
    """out = (x @ weight.T) * scales + bias, of codes of one dtype. Inputs of a token and of an output lie side by side.

    counters: int32 zeros, zeros again afterwards, one per tile of outputs (and tokens) at least, of this layer alone.
    """
    num_tokens, num_in = x_TI.shape
    num_out = len(weight_OI)
    tiles_T, tiles_O = triton.cdiv(num_tokens, blocks.tokens), triton.cdiv(num_out, blocks.outputs)
    splits = blocks.splits if tiles_T * tiles_O <= counters.numel() else 1
    partial = workspace(splits, num_tokens, num_out, x_TI.device)
    is_blockwise = scales is not None and min(scales.group_in, scales.block[1]) < num_in
    if is_blockwise:
        assert scales is not None
        # What has one scale for all inputs may have any number of them.
        assert all(size % blocks.inputs == 0 for size in (scales.group_in, scales.block[1]) if size < num_in)
    _gemm_kernel[(tiles_T, tiles_O, splits)](
        x_TI,
        weight_OI,
        out_TO if scales is None else scales.of_tokens_TG,
        out_TO if scales is None else scales.of_outputs,
        out_TO if bias_O is None else bias_O,
        out_TO,
        out_TO if partial is None else partial,
        counters,
        num_tokens,
        num_out,
        num_in,
        x_TI.stride(0),
        weight_OI.stride(0),
        out_TO.stride(0),
        0 if scales is None else scales.of_tokens_TG.stride(0),
        # One group of all inputs is the same as every group having the same scale.
        0 if scales is None or scales.group_in >= num_in else scales.of_tokens_TG.stride(1),
        0 if scales is None or scales.block[0] >= num_out else scales.of_outputs.stride(0),
        0 if scales is None or scales.block[1] >= num_in else scales.of_outputs.stride(1),
        SCALES=0 if scales is None else 2 if is_blockwise else 1,
        GROUP_I=1 if not is_blockwise or scales is None else scales.group_in,
        SCALE_O=1 if scales is None else scales.block[0],
        SCALE_I=1 if not is_blockwise or scales is None else scales.block[1],
        HAS_BIAS=bias_O is not None,
        IS_EVEN=num_in % (blocks.inputs * splits) == 0,
        IS_INTEGER=x_TI.dtype == torch.int8,
        IS_EXACT=x_TI.dtype == torch.float32,
        PROMOTES=x_TI.dtype.itemsize == 1,
        SPLITS=splits,
        BLOCK_T=blocks.tokens,
        BLOCK_O=blocks.outputs,
        BLOCK_I=blocks.inputs,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **launch_options(),
    )


@triton.jit(**varying("num_tokens", "x_scale_stride_g"))
def _gemm_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    num_tokens,
    num_out,
    num_in,
    x_stride,
    weight_stride,
    out_stride,
    x_scale_stride_t,
    x_scale_stride_g,
    weight_scale_stride_o,
    weight_scale_stride_i,
    SCALES: tl.constexpr,
    GROUP_I: tl.constexpr,
    SCALE_O: tl.constexpr,
    SCALE_I: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    IS_EXACT: tl.constexpr,
    PROMOTES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """SCALES: 0 none, 1 per token and per output, 2 also per block of inputs. IS_EVEN: no block passes the inputs."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    # Outputs beyond the last are computed like the last, and not stored.
    real_output = tl.minimum(output, num_out - 1)
    is_token = token < num_tokens
    turns = tl.cdiv(tl.cdiv(num_in, BLOCK_I), SPLITS)
    first = tl.program_id(2) * turns * BLOCK_I
    last = tl.minimum(first + turns * BLOCK_I, num_in)
    column = tl.arange(0, BLOCK_I)
    weight_ptrs = weight_ptr + real_output.to(tl.int64)[:, None] * weight_stride + column[None, :]
    x_ptrs = x_ptr + token.to(tl.int64)[None, :] * x_stride + column[:, None]
    if SCALES:
        x_scale_ptrs = x_scale_ptr + token.to(tl.int64) * x_scale_stride_t
        weight_scale_ptrs = weight_scale_ptr + (real_output // SCALE_O) * weight_scale_stride_o
    if BLOCK_T <= 64:
        line = tl.arange(0, LINES_AHEAD) * (LINE_BYTES // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8))
        ahead = tl.minimum(first + line, num_in - 1)
        fetch_ahead(weight_ptr + real_output.to(tl.int64)[:, None] * weight_stride + ahead[None, :], OVERLAPS)
    wait_for_inputs(OVERLAPS)
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.int32 if IS_INTEGER and SCALES < 2 else tl.float32)
    for start in range(first, last, BLOCK_I):
        if IS_EVEN:
            weight = tl.load(weight_ptrs + start, eviction_policy="evict_first")
            x = tl.load(x_ptrs + start, is_token[None, :], other=0.0)
        else:
            weight = tl.load(weight_ptrs + start, (start + column < num_in)[None, :], other=0.0)
            x = tl.load(x_ptrs + start, is_token[None, :] & (start + column < num_in)[:, None], other=0.0)
        if SCALES == 2:
            x_scale = tl.load(x_scale_ptrs + start // GROUP_I * x_scale_stride_g, is_token, other=0.0)
            weight_scale = tl.load(weight_scale_ptrs + start // SCALE_I * weight_scale_stride_i)
            if IS_INTEGER:
                products = tl.dot(weight, x, out_dtype=tl.int32).to(tl.float32)
            else:
                products = tl.dot(weight, x)
            total += products * (weight_scale[:, None] * x_scale[None, :])
        elif IS_INTEGER:
            total = tl.dot(weight, x, total, out_dtype=tl.int32)
        elif IS_EXACT:
            total = tl.dot(weight, x, total, input_precision="ieee")
        elif PROMOTES:
            # Matrix units of NVIDIA sum float8 products in fewer bits than float32 has.
            total += tl.dot(weight, x)
        else:
            total = tl.dot(weight, x, total)
    let_next_start(OVERLAPS)
    y = total.to(tl.float32)
    if SCALES == 1:
        x_scale = tl.load(x_scale_ptrs, is_token, other=0.0)
        y *= tl.load(weight_scale_ptrs)[:, None] * x_scale[None, :]
    place = token.to(tl.int64)[None, :]
    is_inside = (output < num_out)[:, None] & is_token[None, :]
    if SPLITS > 1:
        places = place * num_out + output[:, None]
        y, is_last = add_up(y, places, is_inside, partial_ptr, counter_ptr, num_tokens, num_out, SPLITS)
        is_inside = is_inside & is_last
    if HAS_BIAS:
        y += tl.load(bias_ptr + real_output).to(tl.float32)[:, None]
    tl.store(out_ptr + place * out_stride + output[:, None], y.to(out_ptr.dtype.element_ty), is_inside)
