"""Weighted sums of experts' outputs. Knows no weights and no experts.

Shape suffixes: T tokens, K experts per token, N pairs (T * K), D hidden dims.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs


def sum_pairs(
    y_ND: torch.Tensor,
    expert_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    num_experts: int,
    addend_TD: torch.Tensor | None,
) -> torch.Tensor:
    """addend_TD[t] + sum over k of weight_TK[t, k] * y_ND[t * K + k], less those whose expert is not here. [T, D]"""
    num_tokens, num_chosen = expert_TK.shape
    size = y_ND.shape[1]
    out_TD = y_ND.new_empty(num_tokens, size)
    block = min(1024, triton.next_power_of_2(size))
    _sum_kernel[(num_tokens, triton.cdiv(size, block))](
        y_ND,
        expert_TK,
        weight_TK,
        out_TD if addend_TD is None else addend_TD,
        out_TD,
        size,
        num_experts,
        num_chosen,
        block,
        HAS_ADDEND=addend_TD is not None,
        num_warps=4,
        **launch_options(),
    )
    return out_TD


@triton.jit
def _sum_kernel(
    y_ptr,
    expert_ptr,
    weight_ptr,
    addend_ptr,
    out_ptr,
    size,
    num_experts,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < size
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_ADDEND:
        total = tl.load(addend_ptr + token * size + column, is_inside, other=0.0).to(tl.float32)
    for choice in tl.static_range(K):
        pair = token * K + choice
        # What is not here was never written, and may be anything.
        is_here = tl.load(expert_ptr + pair) < num_experts
        y = tl.load(y_ptr + pair * size + column, is_inside & is_here, other=0.0).to(tl.float32)
        total += y * tl.load(weight_ptr + pair).to(tl.float32)
    tl.store(out_ptr + token * size + column, total, is_inside)
