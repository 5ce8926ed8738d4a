"""Experts of very few tokens, with weights in floats: each pair of a token and an expert reads the expert's weights.

Two launches without any sorting, of many small programs, which keep memory busier than tiles of matrix units would.
Shape suffixes: T tokens, K experts per token, N pairs (T * K), D hidden dims, I intermediate dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.moe import ExpertActivation
from atom_cluster.ops.triton.moe_gemm import activation_arguments
from atom_cluster.ops.triton.moe_weights import ExpertMatrix, activate
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """How a product is cut up."""

    block_out: int
    block_in: int
    num_warps: int


def gate_up_of_pairs(
    x_TD: torch.Tensor,
    matrix: ExpertMatrix,
    activation: ExpertActivation,
    expert_TK: torch.Tensor,
    config: GemvConfig,
) -> torch.Tensor:
    """Activated rows of each pair, [N, I]. Those of experts that are not here stay unwritten."""
    size = matrix.num_out // 2
    h_NI = x_TD.new_empty(expert_TK.numel(), size)
    _gate_up_kernel[(triton.cdiv(size, config.block_out), len(h_NI))](
        x_TD,
        matrix.codes,
        matrix.codes if matrix.bias is None else matrix.bias,
        expert_TK,
        h_NI,
        matrix.num_in,
        size,
        matrix.num_experts,
        *activation_arguments(activation),
        HAS_BIAS=matrix.bias is not None,
        IS_OAI=activation.kind == "swiglu_oai",
        HAS_LIMIT=activation.limit is not None,
        K=expert_TK.shape[1],
        BLOCK_OUT=config.block_out,
        BLOCK_IN=config.block_in,
        IS_EVEN=matrix.num_in % config.block_in == 0,
        num_warps=config.num_warps,
        **launch_options(),
    )
    return h_NI


def down_of_tokens(
    h_NI: torch.Tensor,
    matrix: ExpertMatrix,
    expert_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    addend_TD: torch.Tensor | None,
    config: GemvConfig,
) -> torch.Tensor:
    """addend_TD plus weighted sums over each token's pairs, [T, D]."""
    num_tokens, num_chosen = expert_TK.shape
    size = matrix.num_out
    out_TD = h_NI.new_empty(num_tokens, size)
    _down_kernel[(triton.cdiv(size, config.block_out), num_tokens)](
        h_NI,
        matrix.codes,
        matrix.codes if matrix.bias is None else matrix.bias,
        expert_TK,
        weight_TK,
        out_TD if addend_TD is None else addend_TD,
        out_TD,
        matrix.num_in,
        size,
        matrix.num_experts,
        HAS_BIAS=matrix.bias is not None,
        HAS_ADDEND=addend_TD is not None,
        K=num_chosen,
        BLOCK_OUT=config.block_out,
        BLOCK_IN=config.block_in,
        num_warps=config.num_warps,
        **launch_options(),
    )
    return out_TD


@triton.jit
def _gate_up_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    expert_ptr,
    h_ptr,
    num_in,
    size,
    num_experts,
    alpha,
    limit,
    HAS_BIAS: tl.constexpr,
    IS_OAI: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    IS_EVEN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    pair = tl.program_id(1)
    expert = tl.load(expert_ptr + pair)
    if expert >= num_experts:
        return
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.minimum(output, size - 1)[:, None] * num_in
    w_ptr += expert * 2 * size * num_in
    gate = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    up = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for first in tl.range(0, num_in, BLOCK_IN, num_stages=3):
        column = first + tl.arange(0, BLOCK_IN)[None, :]
        if IS_EVEN:
            x = tl.load(x_ptr + pair // K * num_in + column).to(tl.float32)
            gate += x * tl.load(w_ptr + row + column).to(tl.float32)
            up += x * tl.load(w_ptr + size * num_in + row + column).to(tl.float32)
        else:
            is_inside = column < num_in
            x = tl.load(x_ptr + pair // K * num_in + column, is_inside, other=0.0).to(tl.float32)
            gate += x * tl.load(w_ptr + row + column, is_inside, other=0.0).to(tl.float32)
            up += x * tl.load(w_ptr + size * num_in + row + column, is_inside, other=0.0).to(tl.float32)
    gate, up = tl.sum(gate, 1), tl.sum(up, 1)
    is_output = output < size
    if HAS_BIAS:
        bias_ptr += expert * 2 * size + output
        gate += tl.load(bias_ptr, is_output, other=0.0).to(tl.float32)
        up += tl.load(bias_ptr + size, is_output, other=0.0).to(tl.float32)
    tl.store(h_ptr + pair.to(tl.int64) * size + output, activate(gate, up, alpha, limit, IS_OAI, HAS_LIMIT), is_output)


@triton.jit
def _down_kernel(
    h_ptr,
    w_ptr,
    bias_ptr,
    expert_ptr,
    weight_ptr,
    addend_ptr,
    out_ptr,
    num_in,
    size,
    num_experts,
    HAS_BIAS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    K: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(1)
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_output = output < size
    row = tl.minimum(output, size - 1)[:, None] * num_in
    total = tl.zeros([BLOCK_OUT], tl.float32)
    if HAS_ADDEND:
        total += tl.load(addend_ptr + token * size + output, is_output, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    steps = tl.cdiv(num_in, BLOCK_IN)
    # One loop over inputs of all the token's experts: loads of the next expert begin while this one's are added.
    for step in tl.range(0, K * steps, num_stages=3):
        pair = token * K + step // steps
        first = step % steps * BLOCK_IN
        expert = tl.load(expert_ptr + pair)
        # Of an expert that is not here nothing was written, and nothing is read.
        is_here = expert < num_experts
        share = tl.load(weight_ptr + pair).to(tl.float32)
        column = first + tl.arange(0, BLOCK_IN)[None, :]
        is_inside = (column < num_in) & is_here
        h = tl.load(h_ptr + pair * num_in + column, is_inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + expert * size * num_in + row + column, is_inside, other=0.0).to(tl.float32)
        sums += w * (h * share)
        if HAS_BIAS:
            is_first = is_output & is_here & (first == 0)
            total += share * tl.load(bias_ptr + expert * size + output, is_first, other=0.0).to(tl.float32)
    total += tl.sum(sums, 1)
    tl.store(out_ptr + token * size + output, total, is_output)
