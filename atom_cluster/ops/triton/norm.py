"""RMS norms as one pass over memory: alone, behind the residual addition, and gated. Knows no layers.

A block has one row, or several if rows are short, in registers. Rows may be strided two ways, as the heads of tokens
in a wider tensor are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from atom_cluster.ops.triton.runtime import varying

_FEW_ROWS = 512
"""Up to here latency counts more than bandwidth: a row gets as many threads as have 16 bytes to load each."""


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See `ops.norm.RmsNorm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = Rows.of(x)
    if rows.num_rows:
        _rms_norm_kernel[rows.grid](
            rows.tensor,
            rows.tensor,
            weight_D,
            out,
            eps,
            rows.num_rows,
            rows.inner,
            *rows.strides,
            *rows.strides,
            SIZE=x.shape[-1],
            BLOCK=rows.block,
            ROW_BLOCK=rows.row_block,
            IS_WIDE=weight_D.element_size() > x.element_size(),
            ADDS=False,
            num_warps=rows.num_warps,
            **launch_options(),
        )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.norm.AddRmsNorm`; the sum replaces `residual`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = Rows.of(x)
    if not residual.is_contiguous():
        residual = residual.contiguous()
    if rows.num_rows:
        size = x.shape[-1]
        _rms_norm_kernel[rows.grid](
            rows.tensor,
            residual,
            weight_D,
            out,
            eps,
            rows.num_rows,
            rows.inner,
            *rows.strides,
            rows.inner * size,
            size,
            SIZE=size,
            BLOCK=rows.block,
            ROW_BLOCK=rows.row_block,
            IS_WIDE=weight_D.element_size() > x.element_size(),
            ADDS=True,
            num_warps=rows.num_warps,
            **launch_options(),
        )
    return out, residual


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See `ops.gated_delta.GatedRmsNorm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, gates = Rows.of(x, splits=True), Rows.of(gate, splits=True)
    if rows.num_rows:
        _gated_rms_norm_kernel[rows.grid](
            rows.tensor,
            gates.tensor,
            weight_D,
            out,
            eps,
            rows.num_rows,
            rows.inner,
            *rows.strides,
            *gates.strides,
            SIZE=x.shape[-1],
            BLOCK=rows.block,
            ROW_BLOCK=rows.row_block,
            num_warps=rows.num_warps,
            **launch_options(),
        )
    return out


class Rows:
    """A tensor as rows of its last dimension, and the blocks that a kernel takes them in."""

    def __init__(self, tensor: torch.Tensor, num_rows: int, inner: int, strides: tuple[int, int]) -> None:
        """Row r is at (r // inner) * strides[0] + (r % inner) * strides[1]; its elements are neighbours."""
        self.tensor = tensor
        self.num_rows = num_rows
        self.inner = inner
        self.strides = strides
        size = tensor.shape[-1]
        self.block = triton.next_power_of_2(size)
        per_thread = (1 if num_rows <= _FEW_ROWS else 2) * 16 // tensor.element_size()
        wave = 64 if runtime.is_hip() else 32
        threads = max(1, self.block // per_thread)
        # Short rows share a block, as far as there are enough of them for all multiprocessors.
        spare = triton.next_power_of_2(triton.cdiv(num_rows, 4 * runtime.num_multiprocessors(tensor.device)))
        self.row_block = max(1, min(4 * wave // threads, spare))
        self.num_warps = min(max(1, threads * self.row_block // wave), 1024 // wave)

    @property
    def grid(self) -> tuple[int]:
        """One block of threads per block of rows."""
        return (triton.cdiv(self.num_rows, self.row_block),)

    @staticmethod
    def of(x: torch.Tensor, *, splits: bool = False) -> Rows:
        """splits: three dimensions are seen as tokens and heads even where tokens alone would do."""
        if x.stride(-1) != 1:
            x = x.contiguous()
        size = x.shape[-1]
        num_rows = x.numel() // size if size else 0
        if x.ndim == 3 and (splits or not x.is_contiguous()):
            return Rows(x, num_rows, x.shape[1], (x.stride(0), x.stride(1)))
        if x.ndim != 2:
            x = x.reshape(num_rows, size)
        return Rows(x, num_rows, 1, (x.stride(0), 0))


@triton.jit(**varying("num_rows"))
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    num_rows,
    inner,
    x_outer_stride,
    x_inner_stride,
    residual_outer_stride,
    residual_inner_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    IS_WIDE: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_inside = (row < num_rows) & (column < SIZE)
    weight = tl.load(weight_ptr + column, column < SIZE, other=0.0).to(tl.float32)
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    outer, place = (row // inner).to(tl.int64), row % inner
    x_offset = outer * x_outer_stride + place * x_inner_stride + column
    x = tl.load(x_ptr + x_offset, is_inside, other=0.0).to(tl.float32)
    if ADDS:
        residual_offset = outer * residual_outer_stride + place * residual_inner_stride + column
        x += tl.load(residual_ptr + residual_offset, is_inside, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + residual_offset, rounded, is_inside)
        x = rounded.to(tl.float32)
    mean = tl.sum(x * x, axis=1)[:, None] / SIZE
    y = x * tl.rsqrt(mean + eps)
    if not IS_WIDE:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * SIZE + column, y * weight, is_inside)


@triton.jit(**varying("num_rows"))
def _gated_rms_norm_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    out_ptr,
    eps,
    num_rows,
    inner,
    x_outer_stride,
    x_inner_stride,
    gate_outer_stride,
    gate_inner_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_inside = (row < num_rows) & (column < SIZE)
    outer, place = (row // inner).to(tl.int64), row % inner
    weight = tl.load(weight_ptr + column, column < SIZE, other=0.0).to(tl.float32)
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    x_offset = outer * x_outer_stride + place * x_inner_stride + column
    x = tl.load(x_ptr + x_offset, is_inside, other=0.0).to(tl.float32)
    gate_offset = outer * gate_outer_stride + place * gate_inner_stride + column
    gate = tl.load(gate_ptr + gate_offset, is_inside, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=1)[:, None] / SIZE
    y = x * tl.rsqrt(mean + eps) * weight * gate * tl.sigmoid(gate)
    tl.store(out_ptr + row.to(tl.int64) * SIZE + column, y, is_inside)
