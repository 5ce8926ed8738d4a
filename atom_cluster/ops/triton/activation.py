"""Gates as one pass over memory: the activation of an MLP, and a sigmoid that multiplies an output. Knows no layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.norm import Rows
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying


def silu_and_mul(gate_up: torch.Tensor, limit: float | None = None) -> torch.Tensor:
    """See `ops.activation.GateAndMul`."""
    return _gate_and_mul(gate_up, limit, is_gelu=False)


def gelu_tanh_and_mul(gate_up: torch.Tensor, limit: float | None = None) -> torch.Tensor:
    """See `ops.activation.GateAndMul`."""
    return _gate_and_mul(gate_up, limit, is_gelu=True)


def sigmoid_and_mul(x: torch.Tensor, gate: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
    """See `ops.activation.SigmoidAndMul`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, gates = Rows.of(x, splits=True), Rows.of(gate, splits=True)
    addends = rows if addend is None else Rows.of(addend, splits=True)
    if out.numel():
        _sigmoid_and_mul_kernel[rows.grid](
            rows.tensor,
            gates.tensor,
            addends.tensor,
            out,
            rows.num_rows,
            rows.inner,
            *rows.strides,
            *gates.strides,
            *addends.strides,
            SIZE=x.shape[-1],
            BLOCK=rows.block,
            ROW_BLOCK=rows.row_block,
            IS_SCALAR=gate.shape[-1] != x.shape[-1],
            ADDS=addend is not None,
            num_warps=rows.num_warps,
            **launch_options(),
        )
    return out


def _gate_and_mul(gate_up: torch.Tensor, limit: float | None, *, is_gelu: bool) -> torch.Tensor:
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(1024, triton.next_power_of_2(size))
        _gate_and_mul_kernel[(out.numel() // size, triton.cdiv(size, block))](
            gate_up,
            out,
            size,
            0.0 if limit is None else limit,
            BLOCK=block,
            IS_GELU=is_gelu,
            CLAMPS=limit is not None,
            num_warps=_num_warps(block, gate_up),
            **launch_options(),
        )
    return out


def _num_warps(block: int, x: torch.Tensor) -> int:
    """So many that each thread has 16 bytes of a block."""
    return max(1, block * x.element_size() // (16 * (64 if runtime.is_hip() else 32)))


@triton.jit
def _gate_and_mul_kernel(
    gate_up_ptr,
    out_ptr,
    size,
    limit,
    BLOCK: tl.constexpr,
    IS_GELU: tl.constexpr,
    CLAMPS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < size
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    gate = tl.load(gate_up_ptr + row * 2 * size + column, is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + column, is_inside, other=0.0).to(tl.float32)
    if CLAMPS:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if IS_GELU:
        # tanh(z) == 2 sigmoid(2 z) - 1, so half of (1 + tanh(z)) is sigmoid(2 z).
        activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        activated = gate * tl.sigmoid(gate)
    tl.store(out_ptr + row * size + column, activated * up, is_inside)


@triton.jit(**varying("num_rows"))
def _sigmoid_and_mul_kernel(
    x_ptr,
    gate_ptr,
    addend_ptr,
    out_ptr,
    num_rows,
    inner,
    x_outer_stride,
    x_inner_stride,
    gate_outer_stride,
    gate_inner_stride,
    addend_outer_stride,
    addend_inner_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    IS_SCALAR: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_inside = (row < num_rows) & (column < SIZE)
    outer, place = (row // inner).to(tl.int64), row % inner
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    gate_ptrs = gate_ptr + outer * gate_outer_stride + place * gate_inner_stride
    if IS_SCALAR:
        gate = tl.load(gate_ptrs, row < num_rows, other=0.0).to(tl.float32)
    else:
        gate = tl.load(gate_ptrs + column, is_inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + outer * x_outer_stride + place * x_inner_stride + column, is_inside, other=0.0)
    y = x.to(tl.float32) * tl.sigmoid(gate)
    if ADDS:
        addend_ptrs = addend_ptr + outer * addend_outer_stride + place * addend_inner_stride
        y += tl.load(addend_ptrs + column, is_inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * SIZE + column, y, is_inside)
