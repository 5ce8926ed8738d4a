"""Products of very few tokens with plain weights: every weight is read once, in order. Knows no tuning.

Shape suffixes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs

MAX_TOKENS = 8


def gemv(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    out_TO: torch.Tensor,
    *,
    block_out: int,
    block_in: int,
    num_warps: int,
) -> None:
    """out = x @ weight.T + bias, summed in float32. Inputs of a token and of an output lie side by side.

    block_out: outputs of a program. block_in: inputs that it reads of each at a time.
    """
    num_tokens, num_in = x_TI.shape
    num_out = len(weight_OI)
    assert num_tokens <= MAX_TOKENS and x_TI.stride(1) == weight_OI.stride(1) == out_TO.stride(1) == 1
    _gemv_kernel[(triton.cdiv(num_out, block_out),)](
        x_TI,
        weight_OI,
        out_TO if bias_O is None else bias_O,
        out_TO,
        num_out,
        num_in,
        x_TI.stride(0),
        weight_OI.stride(0),
        out_TO.stride(0),
        TOKENS=num_tokens,
        PADDED_TOKENS=triton.next_power_of_2(num_tokens),
        HAS_BIAS=bias_O is not None,
        IS_EVEN=num_in % block_in == 0 and num_out % block_out == 0,
        BLOCK_O=block_out,
        BLOCK_I=block_in,
        num_warps=num_warps,
        **launch_options(),
    )


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_out,
    num_in,
    x_stride,
    weight_stride,
    out_stride,
    TOKENS: tl.constexpr,
    PADDED_TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tl.arange(0, BLOCK_I)
    token = tl.arange(0, PADDED_TOKENS)
    weight_ptrs = weight_ptr + output.to(tl.int64)[:, None] * weight_stride + column[None, :]
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * x_stride + column[None, :]
    # The weights of the next turn are on their way during each turn; the first ones before there are inputs.
    if IS_EVEN:
        weight = tl.load(weight_ptrs, eviction_policy="evict_first")
    else:
        weight = tl.load(weight_ptrs, (output < num_out)[:, None] & (column < num_in)[None, :], other=0.0)
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    total = tl.zeros([PADDED_TOKENS, BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, num_in, BLOCK_I):
        following = start + BLOCK_I + column
        if IS_EVEN and TOKENS == PADDED_TOKENS:
            x = tl.load(x_ptrs + start)
        else:
            x = tl.load(x_ptrs + start, (token < TOKENS)[:, None] & (start + column < num_in)[None, :], other=0.0)
        if IS_EVEN:
            is_wanted = following < num_in
            ahead = tl.load(weight_ptrs + start + BLOCK_I, is_wanted[None, :], eviction_policy="evict_first")
        else:
            is_wanted = (output < num_out)[:, None] & (following < num_in)[None, :]
            ahead = tl.load(weight_ptrs + start + BLOCK_I, is_wanted, other=0.0)
        total += weight.to(tl.float32)[None, :, :] * x.to(tl.float32)[:, None, :]
        weight = ahead
    y = tl.sum(total, 2)
    if HAS_BIAS:
        y += tl.load(bias_ptr + output, output < num_out, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + token.to(tl.int64)[:, None] * out_stride + output[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), (token < TOKENS)[:, None] & (output < num_out)[None, :])
