"""Experts on GPUs: products of few tokens read weights pair by pair, those of more are grouped by expert.

Weights stay as they are stored; nothing waits for the device, and launches depend on shapes alone. Shape suffixes: T
tokens, D hidden dims, E experts, I intermediate dims, K experts per token, N pairs (T * K).
"""

from __future__ import annotations

from math import gcd

import torch

from atom_cluster.ops.moe import ExpertActivation, ExpertsOp
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight
from atom_cluster.ops.torch_ref.quantized_moe import QuantizedExperts
from atom_cluster.ops.triton import moe_config, moe_gemm_hopper
from atom_cluster.ops.triton.moe_gemm import Inputs, multiply_pairs
from atom_cluster.ops.triton.moe_gemv import down_of_tokens, gate_up_of_pairs
from atom_cluster.ops.triton.moe_sort import sort_pairs, unsorted_pairs
from atom_cluster.ops.triton.moe_sum import sum_pairs
from atom_cluster.ops.triton.moe_weights import ExpertMatrix, plain_matrix, quantized_matrix, reason_against
from atom_cluster.ops.triton.quantize import quantize_inputs, round_inputs

_SMALLEST_STEP = 32
"""Codes that a product of codes takes at a time, at least."""


class TritonExperts:
    """Both matrices of all experts, in memory as they are stored."""

    def __init__(self, gate_up: _Factor, down: _Factor, activation: ExpertActivation, name: str) -> None:
        self._gate_up, self._down = gate_up, down
        self._activation = activation
        self._is_for_hopper = gate_up.is_for_hopper(is_gated=True) and down.is_for_hopper(is_gated=False)
        self.name = name

    def __call__(
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        *,
        addend_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, D] -> [T, D]"""
        num_pairs = expert_TK.numel()
        if not num_pairs:
            return torch.zeros_like(x_TD) if addend_TD is None else addend_TD
        x_TD, expert_TK, weight_TK = x_TD.contiguous(), expert_TK.contiguous(), weight_TK.contiguous()
        addend_TD = None if addend_TD is None else addend_TD.contiguous()
        gate_up, down = self._gate_up, self._down
        num_tokens, num_chosen = expert_TK.shape
        num_experts = gate_up.matrix.num_experts
        is_unsorted = moe_config.is_unsorted(num_tokens, num_pairs, num_experts)
        if is_unsorted and gate_up.kind == "float":
            h_NI = gate_up_of_pairs(x_TD, gate_up.matrix, self._activation, expert_TK, moe_config.gemv(is_gated=True))
            config = moe_config.gemv(is_gated=False)
            return down_of_tokens(h_NI, down.matrix, expert_TK, weight_TK, addend_TD, config)
        if self._is_for_hopper and moe_gemm_hopper.has_type(x_TD.dtype) and moe_config.is_for_hopper(num_pairs):
            tiles = sort_pairs(expert_TK, num_experts, moe_gemm_hopper.ROWS, 1)
            h = moe_gemm_hopper.multiply_gated(
                gate_up.codes(x_TD), gate_up.matrix, tiles, self._activation, num_chosen, x_TD.dtype
            )
            y_ND = x_TD.new_empty(num_pairs, down.matrix.num_out)
            moe_gemm_hopper.multiply_down(h, down.matrix, tiles, y_ND)
            return sum_pairs(y_ND, expert_TK, weight_TK, num_experts, addend_TD)
        rows = 1 if is_unsorted else moe_config.rows_per_tile(num_pairs, num_experts)
        first, second = (
            moe_config.gemm(factor.matrix, factor.kind, x_TD.dtype, rows, factor.largest_step, is_gated=is_gated)
            for factor, is_gated in ((gate_up, True), (down, False))
        )
        if is_unsorted:
            tiles = unsorted_pairs(expert_TK)
        else:
            tiles = sort_pairs(expert_TK, num_experts, rows, max(first.tiles_together, second.tiles_together))
        h_NI = x_TD.new_empty(num_pairs, gate_up.matrix.num_out // 2)
        multiply_pairs(
            gate_up.inputs(x_TD),
            gate_up.matrix,
            tiles,
            first,
            activation=self._activation,
            num_chosen=num_chosen,
            out=h_NI,
        )
        y_ND = x_TD.new_empty(num_pairs, down.matrix.num_out)
        multiply_pairs(down.inputs(h_NI), down.matrix, tiles, second, activation=None, num_chosen=num_chosen, out=y_ND)
        return sum_pairs(y_ND, expert_TK, weight_TK, num_experts, addend_TD)


class _Factor:
    """A matrix, and how its inputs are rounded before it multiplies them."""

    def __init__(
        self, matrix: ExpertMatrix, spec: InputQuantization | None = None, static_scale_E: torch.Tensor | None = None
    ) -> None:
        self.matrix = matrix
        self._spec = spec
        self._static_scale_E = static_scale_E
        self.is_static = spec is not None and spec.is_static
        self._multiplies_codes = spec is not None and _multiplies_codes(matrix, spec)
        self.kind: moe_config.Kind = "packed"
        if matrix.kind == "float" or (self._multiplies_codes and not self.is_static):
            self.kind = "float" if matrix.kind == "float" else "codes"
        self._float8_dtype = matrix.codes.dtype if matrix.kind == "float8" else torch.float8_e4m3fn
        self.largest_step = 1 << 30
        """Inputs that may be taken at a time, a power of two: one scale has to be right for all of them."""
        if self._multiplies_codes and spec is not None:
            step = gcd(matrix.group, spec.group_size or 0)
            self.largest_step = step & -step or self.largest_step

    def is_for_hopper(self, *, is_gated: bool) -> bool:
        """Whether `moe_gemm_hopper` multiplies it: what activates rows there rounds them too."""
        spec = self._spec
        return (
            spec is not None
            and (spec.number, spec.group_size, spec.scale_format) == ("float8", moe_gemm_hopper.BLOCK, "float32")
            and not spec.is_static
            and (is_gated or spec.max_abs is None)
            and moe_gemm_hopper.is_fit(self.matrix, is_gated=is_gated)
        )

    def codes(self, x: torch.Tensor) -> moe_gemm_hopper.Codes:
        """Rows for `moe_gemm_hopper`."""
        assert self._spec is not None
        return moe_gemm_hopper.Codes(*quantize_inputs(x, self._spec, float8_dtype=self._float8_dtype))

    def inputs(self, x: torch.Tensor) -> Inputs:
        """Rows as the matrix wants them."""
        if self._spec is None:
            return Inputs(values=x)
        if self.is_static:
            return Inputs(values=x, static_scale=self._static_scale_E)
        if not self._multiplies_codes:
            return Inputs(values=round_inputs(x, self._spec, float8_dtype=self._float8_dtype))
        codes, scale = quantize_inputs(x, self._spec, float8_dtype=self._float8_dtype)
        group = self._spec.group_size or 0
        return Inputs(values=codes, scale=scale, group=0 if group >= x.shape[1] else group)


def prepare_experts(
    gate_up_EOD: torch.Tensor,
    down_EDI: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: ExpertActivation,
    dtype: torch.dtype,
) -> ExpertsOp:
    """Convert to `dtype`."""
    gate_up, down = plain_matrix(gate_up_EOD, gate_up_bias, dtype), plain_matrix(down_EDI, down_bias, dtype)
    name = f"{str(dtype).removeprefix('torch.')} x {len(down_EDI)} experts"
    return TritonExperts(_Factor(gate_up), _Factor(down), activation, name)


def prepare_quantized_experts(
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    *,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: ExpertActivation,
    dtype: torch.dtype,
) -> ExpertsOp:
    """The weights as they are; those that kernels do not take go to the reference, whose name then says why."""
    name = f"{down.name} x {len(down.codes)} experts"
    for weight in (gate_up, down):
        reason = reason_against(weight) or _reason_against_inputs(weight)
        if reason is not None:
            op = QuantizedExperts(gate_up, down, (gate_up_bias, down_bias), activation, dtype)
            op.name = f"{name}, expert by expert: {reason}"
            return op
    factors = [
        _Factor(quantized_matrix(weight, bias), weight.inputs, weight.input_scale)
        for weight, bias in ((gate_up, gate_up_bias), (down, down_bias))
    ]
    return TritonExperts(factors[0], factors[1], activation, name)


def _reason_against_inputs(weight: QuantizedWeight) -> str | None:
    """Why kernels do not round inputs so; None: they do."""
    spec = weight.inputs
    if spec is not None and spec.is_static and (spec.number, weight.number) != ("float8", "float8"):
        return f"inputs are {spec.name}"
    if spec is not None and spec.is_static and not _multiplies_codes(quantized_matrix(weight, None), spec):
        return f"inputs are {spec.name}"
    return None


def _multiplies_codes(matrix: ExpertMatrix, spec: InputQuantization) -> bool:
    """Whether codes of weights and inputs are multiplied, and sums scaled; otherwise numbers are multiplied."""
    step = gcd(matrix.group, spec.group_size or 0)
    return spec.number == matrix.kind and matrix.zero is None and (step == 0 or step % (2 * _SMALLEST_STEP) == 0)
