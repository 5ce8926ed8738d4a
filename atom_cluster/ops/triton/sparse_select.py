"""The best of each token's scores, by digits of the scores, as one kernel. Knows no keys.

Four passes find the K-th best score, eight bits of it each, and a fifth writes down what is better or, as far as there
is room, as good. Nothing is sorted and no order of arrival counts, so that a token selects alike in any batch.

Shape suffixes: T tokens, C entries of the longest row, K selected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying


def select_best(score_TC: torch.Tensor, seen_T: torch.Tensor, out_TK: torch.Tensor) -> None:
    """Positions of the K best of the first `seen_T` scores of each token, in order; -1 behind them."""
    num_tokens, num_selected = out_TK.shape
    if runtime.INTERPRETED:
        block, warps = 64, 4
    else:
        # Few tokens leave most of the chip idle, whatever one does; many share it.
        block, warps = (8192, 16) if num_tokens <= runtime.num_multiprocessors(out_TK.device) else (2048, 4)
    _select_kernel[(num_tokens,)](
        score_TC,
        seen_T,
        out_TK,
        score_TC.stride(0),
        out_TK.stride(0),
        K=num_selected,
        BLOCK=block,
        num_warps=warps,
        **launch_options(),
    )


@triton.jit(**varying("seen_ptr", "score_stride", "out_stride"))
def _select_kernel(
    score_ptr,
    seen_ptr,
    out_ptr,
    score_stride,
    out_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program: one token."""
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    seen = tl.load(seen_ptr + token)
    out_ptr += token * out_stride
    lane = tl.arange(0, BLOCK)
    if seen <= K:
        for first in range(0, K, BLOCK):
            tl.store(out_ptr + first + lane, tl.where(first + lane < seen, first + lane, -1), first + lane < K)
    else:
        score_ptr += token * score_stride
        digit = tl.arange(0, 256)
        threshold = tl.zeros([], tl.uint32)
        num_left = tl.zeros([], tl.int32) + K
        for index in tl.static_range(4):
            counts = tl.zeros([256], tl.int32)
            for first in range(0, seen, BLOCK):
                order = _ordered(score_ptr, first + lane, seen)
                is_counted = first + lane < seen
                if index > 0:
                    is_counted = is_counted & ((order >> (32 - 8 * index)) == threshold)
                found = ((order >> (24 - 8 * index)) & 255).to(tl.int32)
                counts += tl.histogram(found, 256, mask=is_counted)
            num_better = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
            is_digit = (num_better < num_left) & (num_better + counts >= num_left)
            chosen = tl.sum(tl.where(is_digit, digit, 0), axis=0)
            num_left -= tl.sum(tl.where(is_digit, num_better, 0), axis=0)
            threshold = threshold * 256 + chosen.to(tl.uint32)
        num_written = tl.zeros([], tl.int32)
        for first in range(0, seen, BLOCK):
            order = _ordered(score_ptr, first + lane, seen)
            is_equal = ((order == threshold) & (first + lane < seen)).to(tl.int32)
            is_better = (order > threshold) & (first + lane < seen)
            is_chosen = is_better | ((is_equal > 0) & (tl.cumsum(is_equal, axis=0) <= num_left))
            num_left -= tl.sum(is_equal, axis=0)
            ones = is_chosen.to(tl.int32)
            tl.store(out_ptr + num_written + tl.cumsum(ones, axis=0) - 1, first + lane, is_chosen)
            num_written += tl.sum(ones, axis=0)


@triton.jit
def _ordered(score_ptr, position, seen):
    """Unsigned integers in the order of the scores."""
    score = tl.load(score_ptr + position, position < seen, other=0.0)
    # Both zeros are equal.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)
