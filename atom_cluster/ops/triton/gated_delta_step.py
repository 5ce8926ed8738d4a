"""The gated delta rule token by token, for rows of few tokens: reads a state once, and writes what is to be kept.

A block has some value dims of one head of one row, with all key dims: their states do not depend on other value dims.
Knows no layers. Shape suffixes as in `ops.gated_delta`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.gated_delta import Gates, StateMetadata
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying


@dataclass(frozen=True, slots=True)
class SteppedRows:
    """Rows that are stepped through."""

    num_rows: int
    rows: torch.Tensor | None
    """[num_rows] int32; None: the first ones."""
    query_start: torch.Tensor
    """[R + 1] int32"""
    has_one_token: bool
    """Each of them has one token, and they are the first rows, so row r has token r."""


def run_steps(
    query_TGK: torch.Tensor,
    key_TGK: torch.Tensor,
    value_THV: torch.Tensor,
    gates: Gates,
    state_NHKV: torch.Tensor,
    output_THV: torch.Tensor,
    rows: SteppedRows,
    states: StateMetadata,
) -> None:
    """Writes the outputs of the rows' tokens, and states into their pages."""
    num_heads, value_dim = value_THV.shape[1:]
    num_key_heads, key_dim = key_TGK.shape[1:]
    value_block, num_warps = _options(rows.num_rows * num_heads, value_THV)
    _step_kernel[(triton.cdiv(value_dim, value_block), num_heads, rows.num_rows)](
        query_TGK,
        key_TGK,
        value_THV,
        gates.decay_TH,
        gates.learn_TH,
        gates.log_rate_H,
        gates.decay_bias_H,
        state_NHKV,
        output_THV,
        rows.query_start if rows.rows is None else rows.rows,
        rows.query_start,
        states.read_page,
        states.write_page,
        states.write_page.stride(0),
        query_TGK.stride(0),
        query_TGK.stride(1),
        key_TGK.stride(0),
        key_TGK.stride(1),
        value_THV.stride(0),
        value_THV.stride(1),
        gates.decay_TH.stride(0),
        gates.learn_TH.stride(0),
        state_NHKV.stride(0),
        key_dim**-0.5,
        GROUP=num_heads // num_key_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_BLOCK=triton.next_power_of_2(key_dim),
        VALUE_BLOCK=value_block,
        HAS_ONE_TOKEN=rows.has_one_token,
        HAS_LIST=rows.rows is not None,
        num_warps=num_warps,
        **launch_options(),
    )


def _options(num_states: int, value_THV: torch.Tensor) -> tuple[int, int]:
    """(value dims of a block, its warps): small blocks for few states, to give all multiprocessors something to do."""
    value_dim = value_THV.shape[2]
    num_small_blocks = num_states * triton.cdiv(value_dim, 16) / runtime.num_multiprocessors(value_THV.device)
    block = 16 if num_small_blocks <= 8 else 32 if num_small_blocks <= 64 else 64
    block = min(block, triton.next_power_of_2(value_dim))
    return block, max(1, block // (32 if runtime.is_hip() else 16))


@triton.jit
def gates_of(decay, learn, log_rate, decay_bias):
    """(log of what is kept, share of what is learnt) of what comes out of the projections, float32."""
    x = decay.to(tl.float32) + decay_bias
    softplus = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
    return -tl.exp(log_rate) * softplus, tl.sigmoid(learn.to(tl.float32))


@triton.jit(**varying("rows_ptr", "query_start_ptr", "read_page_ptr", "write_page_ptr"))
def _step_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    decay_ptr,
    learn_ptr,
    log_rate_ptr,
    decay_bias_ptr,
    state_ptr,
    output_ptr,
    rows_ptr,
    query_start_ptr,
    read_page_ptr,
    write_page_ptr,
    write_page_stride,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    decay_stride,
    learn_stride,
    page_stride,
    scale,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HAS_ONE_TOKEN: tl.constexpr,
    HAS_LIST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row = tl.program_id(2)
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    if HAS_LIST:
        row = tl.load(rows_ptr + row)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    k = tl.arange(0, KEY_BLOCK)
    v = tl.program_id(0) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    has_k, has_v = k < KEY_DIM, v < VALUE_DIM
    in_state = has_k[:, None] & has_v[None, :]
    state_ptrs = state_ptr + head * KEY_DIM * VALUE_DIM + k[:, None] * VALUE_DIM + v[None, :]
    page = tl.load(read_page_ptr + row).to(tl.int64)
    state = tl.load(state_ptrs + page * page_stride, in_state & (page >= 0), other=0.0)
    log_rate = tl.load(log_rate_ptr + head)
    decay_bias = tl.load(decay_bias_ptr + head)
    if HAS_ONE_TOKEN:
        start, num_tokens = row, 1
    else:
        start = tl.load(query_start_ptr + row)
        num_tokens = tl.load(query_start_ptr + row + 1) - start
    for index in range(num_tokens):
        token = (start + index).to(tl.int64)
        key = tl.load(key_ptr + token * key_stride + (head // GROUP) * key_head_stride + k, has_k, other=0.0)
        query = tl.load(query_ptr + token * query_stride + (head // GROUP) * query_head_stride + k, has_k, other=0.0)
        value = tl.load(value_ptr + token * value_stride + head * value_head_stride + v, has_v, other=0.0)
        decay = tl.load(decay_ptr + token * decay_stride + head)
        learn = tl.load(learn_ptr + token * learn_stride + head)
        decay, learn = gates_of(decay, learn, log_rate, decay_bias)
        key, query = key.to(tl.float32), query.to(tl.float32)
        key *= tl.rsqrt(tl.sum(key * key, axis=0) + 1e-6)
        query *= tl.rsqrt(tl.sum(query * query, axis=0) + 1e-6) * scale
        state *= tl.exp(decay)
        # q^T of the state behind the token is that of the one before it, plus q^T k of what is learnt.
        recalled = tl.sum(state * key[:, None], axis=0)
        asked = tl.sum(state * query[:, None], axis=0)
        learnt = learn * (value.to(tl.float32) - recalled)
        state += key[:, None] * learnt[None, :]
        output = asked + tl.sum(query * key, axis=0) * learnt
        tl.store(output_ptr + (token * num_heads + head) * VALUE_DIM + v, output, has_v)
        page = tl.load(write_page_ptr + row * write_page_stride + index).to(tl.int64)
        tl.store(state_ptrs + page * page_stride, state, in_state)
