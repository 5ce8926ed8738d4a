"""Gated activations of an MLP as one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `ops.activation.GateAndMul`."""
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    num_rows = out.numel() // size
    if num_rows:
        block = min(1024, triton.next_power_of_2(size))
        _silu_and_mul_kernel[(num_rows, triton.cdiv(size, block))](gate_up, out, size, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < size
    gate = tl.load(gate_up_ptr + row * 2 * size + column, is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + column, is_inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + column, gate * tl.sigmoid(gate) * up, is_inside)
