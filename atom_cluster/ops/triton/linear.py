"""Linear op for GPUs, plain weights: own kernels for few tokens, the vendor's library for many. Knows no quantization.

Shape suffixes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atom_cluster.ops.activation import GateAndMul
from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.torch_ref.linear import prepare_linear as prepare_plain
from atom_cluster.ops.triton.activation import silu_and_mul
from atom_cluster.ops.triton.gemm import Scales, gemm
from atom_cluster.ops.triton.gemm_hopper import MAX_TOKENS as MAX_GEMM_HOPPER_TOKENS
from atom_cluster.ops.triton.gemm_hopper import gemm_hopper
from atom_cluster.ops.triton.gemm_hopper import is_fit as is_fit_for_gemm
from atom_cluster.ops.triton.gemm_hopper_cut import PIECE, HopperBlocks
from atom_cluster.ops.triton.gemv import MAX_TOKENS as MAX_GEMV_TOKENS
from atom_cluster.ops.triton.gemv import gemv
from atom_cluster.ops.triton.gemv_hopper import MAX_TOKENS as MAX_HOPPER_TOKENS
from atom_cluster.ops.triton.gemv_hopper import Norm, Rounding, gemv_hopper, is_fit
from atom_cluster.ops.triton.linear_blocks import (
    GEMM,
    GEMV,
    MAX_TUNED_TOKENS,
    Choice,
    choose,
    gemm_blocks,
    gemm_hopper_blocks,
    hopper_blocks,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def new_counters(num_out: int, device: torch.device) -> torch.Tensor:
    """What `gemm` counts with: enough for the smallest tiles of outputs, twice."""
    return torch.zeros(2 * (-(-num_out // 16)), dtype=torch.int32, device=device)


def product_by_hopper(
    kind: str,
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    out_dtype: torch.dtype,
    rounding: Rounding | None = None,
    *,
    gates: bool,
) -> torch.Tensor | None:
    """What `gemv_hopper` computes, where it is the kernel to take. kind: of the weight, as its choices are named."""
    num_tokens, (num_out, num_in) = len(x_TI), weight_OI.shape
    blocks = hopper_blocks(kind, num_out, num_in, num_tokens) if num_tokens <= MAX_HOPPER_TOKENS else None
    if blocks is None or not is_fit(x_TI, weight_OI, blocks.inputs):
        return None
    out_TO = x_TI.new_empty(num_tokens, num_out // 2 if gates else num_out, dtype=out_dtype)
    gemv_hopper(x_TI, weight_OI, bias_O, out_TO, blocks, rounding, gates=gates)
    return out_TO


def blocks_of_some_tokens(kind: str, num_out: int, num_in: int, num_tokens: int) -> HopperBlocks | None:
    """How `gemm_hopper` cuts the product, where it is the kernel to take. kind: as above."""
    if not 0 < num_tokens <= MAX_GEMM_HOPPER_TOKENS:
        return None
    return gemm_hopper_blocks(kind, num_out, num_in, num_tokens)


def product_of_some_tokens(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    out_dtype: torch.dtype,
    rounds: torch.Tensor,
    blocks: HopperBlocks,
    scales: Scales | None = None,
    *,
    activation: GateAndMul | None,
) -> torch.Tensor:
    """What `gemm_hopper` computes of what is fit for it, and what the activation makes of that."""
    num_out = len(weight_OI)
    gates = activation is silu_and_mul and blocks.pieces == 2 and num_out % (2 * PIECE) == 0
    out_TO = x_TI.new_empty(len(x_TI), num_out // 2 if gates else num_out, dtype=out_dtype)
    gemm_hopper(x_TI, weight_OI, bias_O, out_TO, rounds, blocks, scales, gates=gates)
    return out_TO if activation is None or gates else activation(out_TO)


class PlainLinear:
    """`x @ weight.T + bias`, summed in float32."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, out_dtype: torch.dtype) -> None:
        self._weight_OI = weight_OI
        self._bias_O = bias_O
        self._out_dtype = out_dtype
        self._kind = str(weight_OI.dtype).removeprefix("torch.")
        self._counters = new_counters(len(weight_OI), weight_OI.device)
        self._rounds = torch.zeros_like(self._counters)

    @property
    def name(self) -> str:
        """The weight's dtype, and that of results if it differs."""
        out = str(self._out_dtype).removeprefix("torch.")
        return self._kind if out == self._kind else f"{self._kind} to {out}"

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]"""
        return self._multiply(x_TI, None)

    def gated(self, x_TI: torch.Tensor, activation: GateAndMul) -> torch.Tensor:
        """[T, in] -> [T, out / 2]"""
        return self._multiply(x_TI, activation)

    def normalized(
        self,
        x_TI: torch.Tensor,
        residual_TI: torch.Tensor,
        weight_I: torch.Tensor,
        eps: float,
        activation: GateAndMul | None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `ops.linear.NormalizedProduct`."""
        num_tokens, (num_out, num_in) = len(x_TI), self._weight_OI.shape
        if not 0 < num_tokens <= MAX_HOPPER_TOKENS or activation not in (None, silu_and_mul):
            return None
        blocks = hopper_blocks(self._kind, num_out, num_in, num_tokens)
        if blocks is None or not blocks.norms or not is_fit(x_TI, self._weight_OI, blocks.inputs):
            return None
        if residual_TI.dtype != x_TI.dtype or not (x_TI.is_contiguous() and residual_TI.is_contiguous()):
            return None
        gates = activation is not None
        out_TO = x_TI.new_empty(num_tokens, num_out // 2 if gates else num_out, dtype=self._out_dtype)
        norm = Norm(residual_TI=residual_TI, weight_I=weight_I, eps=eps, sum_TI=torch.empty_like(x_TI))
        gemv_hopper(x_TI, self._weight_OI, self._bias_O, out_TO, blocks, norm=norm, gates=gates)
        return out_TO, norm.sum_TI

    def _multiply(self, x_TI: torch.Tensor, activation: GateAndMul | None) -> torch.Tensor:
        gates = activation is silu_and_mul
        y_TO = product_by_hopper(self._kind, x_TI, self._weight_OI, self._bias_O, self._out_dtype, gates=gates)
        if y_TO is None:
            num_out, num_in = self._weight_OI.shape
            blocks = blocks_of_some_tokens(self._kind, num_out, num_in, len(x_TI))
            if blocks is not None and is_fit_for_gemm(x_TI, self._weight_OI, self._out_dtype):
                rounds, out_dtype = self._rounds, self._out_dtype
                return product_of_some_tokens(
                    x_TI, self._weight_OI, self._bias_O, out_dtype, rounds, blocks, activation=activation
                )
            y_TO, gates = self._by_others(x_TI), False
        return y_TO if activation is None or gates else activation(y_TO)

    def _by_others(self, x_TI: torch.Tensor) -> torch.Tensor:
        num_tokens = len(x_TI)
        if 0 < num_tokens <= MAX_TUNED_TOKENS:
            num_out, num_in = self._weight_OI.shape
            choice = choose(self._kind, num_out, num_in, num_tokens)
            if choice["kernel"] == GEMV and num_tokens <= MAX_GEMV_TOKENS or choice["kernel"] == GEMM:
                return self._own(x_TI if x_TI.stride(1) == 1 else x_TI.contiguous(), choice)
        if self._out_dtype == x_TI.dtype:
            return F.linear(x_TI, self._weight_OI, self._bias_O)
        if x_TI.is_cuda:
            y_TO = torch.mm(x_TI, self._weight_OI.T, out_dtype=self._out_dtype)
        else:
            y_TO = x_TI.to(self._out_dtype) @ self._weight_OI.to(self._out_dtype).T
        return y_TO if self._bias_O is None else y_TO.add_(self._bias_O)

    def _own(self, x_TI: torch.Tensor, choice: Choice) -> torch.Tensor:
        out_TO = torch.empty(len(x_TI), len(self._weight_OI), dtype=self._out_dtype, device=x_TI.device)
        if choice["kernel"] == GEMM:
            gemm(x_TI, self._weight_OI, self._bias_O, out_TO, self._counters, gemm_blocks(choice))
        else:
            cut = {key: value for key, value in choice.items() if key != "kernel"}
            gemv(x_TI, self._weight_OI, self._bias_O, out_TO, **cut)
        return out_TO


def prepare_linear(
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
) -> LinearOp:
    """Convert to `dtype`; a weight that already has it is used as it is, shared with whoever else holds it."""
    if dtype not in _DTYPES:
        return prepare_plain(weight_OI, bias_O, dtype=dtype, out_dtype=out_dtype)
    weight_OI = weight_OI.to(dtype)
    if weight_OI.stride(1) != 1:
        weight_OI = weight_OI.contiguous()
    out_dtype = out_dtype or dtype
    return PlainLinear(weight_OI, None if bias_O is None else bias_O.to(out_dtype), out_dtype)
