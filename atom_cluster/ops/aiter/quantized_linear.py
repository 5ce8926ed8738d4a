"""Products with quantized weights by AITER's matrix kernels: inputs are rounded by one, multiplied by another.

Knows no layers. What AITER has no kernel for is left to the backend that it was given.
"""

from __future__ import annotations

import torch

from atom_cluster.ops.aiter.binding import HALF_DTYPES, AiterFunction
from atom_cluster.ops.aiter.weights import (
    SHUFFLE_SCALE,
    SHUFFLE_WEIGHT,
    PackedWeight,
    QuantizedKind,
    can_be_shuffled,
    per_channel_scale,
    quantized_kind,
    shuffled_float4,
)
from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.quantized import PrepareQuantizedLinear, QuantizedWeight

ROUND_GROUPS = AiterFunction(
    "aiter.ops.quant", "per_group_quant_hip", "x", "quant_dtype", "group_size", "transpose_scale"
)
ROUND_TOKENS = AiterFunction("aiter.ops.quant", "per_token_quant_hip", "x", "quant_dtype")
ROUND_FLOAT4 = AiterFunction("aiter.ops.quant", "per_1x32_f4_quant_hip", "x", "quant_dtype", "shuffle")
MULTIPLY_BLOCKS = AiterFunction(
    "aiter.ops.gemm_op_a8w8", "gemm_a8w8_blockscale_bpreshuffle", "XQ", "WQ", "x_scale", "w_scale", "dtype"
)
MULTIPLY_TOKENS = AiterFunction(
    "aiter.ops.gemm_op_a8w8", "gemm_a8w8_bpreshuffle", "XQ", "WQ", "x_scale", "w_scale", "dtype"
)
MULTIPLY_FLOAT4 = AiterFunction(
    "aiter.ops.gemm_op_a4w4", "gemm_a4w4", "A", "B", "A_scale", "B_scale", "dtype", "bpreshuffle"
)
FUNCTIONS = (ROUND_GROUPS, ROUND_TOKENS, MULTIPLY_BLOCKS, MULTIPLY_TOKENS, SHUFFLE_WEIGHT)
FLOAT4_FUNCTIONS = (ROUND_FLOAT4, MULTIPLY_FLOAT4, SHUFFLE_SCALE)


class ShuffledLinear:
    """`round(x) @ weight.T + bias`, the weight in the order of the matrix units' operands."""

    def __init__(
        self, weight: PackedWeight, bias_O: torch.Tensor | None, *, kind: QuantizedKind, dtype: torch.dtype, name: str
    ) -> None:
        self.name = name
        self._weight, self._bias_O = weight, bias_O
        self._dtype = dtype
        self._multiply = {
            "block": self._multiply_blocks,
            "token": self._multiply_tokens,
            "float4": self._multiply_float4,
        }[kind]

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]"""
        if len(x_TI) == 0:
            return x_TI.new_empty(0, self._weight.codes.shape[0])
        y_TO = self._multiply(x_TI.contiguous())
        return y_TO if self._bias_O is None else y_TO.add_(self._bias_O)

    def _multiply_blocks(self, x_TI: torch.Tensor) -> torch.Tensor:
        codes = self._weight.codes
        # The scales come transposed in memory, in the shape that they would have otherwise.
        rounded, scale = ROUND_GROUPS(x=x_TI, quant_dtype=codes.dtype, group_size=128, transpose_scale=True)
        y_TO: torch.Tensor = MULTIPLY_BLOCKS(
            XQ=rounded, WQ=codes, x_scale=scale, w_scale=self._weight.scale, dtype=self._dtype
        )
        return y_TO

    def _multiply_tokens(self, x_TI: torch.Tensor) -> torch.Tensor:
        codes = self._weight.codes
        rounded, scale = ROUND_TOKENS(x=x_TI, quant_dtype=codes.dtype)
        y_TO: torch.Tensor = MULTIPLY_TOKENS(
            XQ=rounded, WQ=codes, x_scale=scale, w_scale=self._weight.scale, dtype=self._dtype
        )
        return y_TO

    def _multiply_float4(self, x_TI: torch.Tensor) -> torch.Tensor:
        codes = self._weight.codes
        rounded, scale = ROUND_FLOAT4(x=x_TI, quant_dtype=codes.dtype, shuffle=True)
        y_TO: torch.Tensor = MULTIPLY_FLOAT4(
            A=rounded, B=codes, A_scale=scale, B_scale=self._weight.scale, dtype=self._dtype, bpreshuffle=True
        )
        return y_TO


def quantized_linear_preparer(
    fallback: PrepareQuantizedLinear, *, float8_dtype: torch.dtype, has_float4: bool
) -> PrepareQuantizedLinear:
    """Linear ops of weights in eight or four bits; others are prepared by `fallback`.

    has_float4: whether the chip multiplies four-bit numbers.
    """

    def prepare_quantized_linear(
        weight: QuantizedWeight, bias_O: torch.Tensor | None, *, dtype: torch.dtype
    ) -> LinearOp:
        kind = quantized_kind(weight, float8_dtype, has_float4=has_float4)
        if kind is None or dtype not in HALF_DTYPES or not can_be_shuffled(weight.codes) or weight.num_in % 128 != 0:
            return fallback(weight, bias_O, dtype=dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
        name = f"{weight.name}, shuffled (aiter)"
        return ShuffledLinear(_packed(weight, kind), bias_O, kind=kind, dtype=dtype, name=name)

    return prepare_quantized_linear


def _packed(weight: QuantizedWeight, kind: QuantizedKind) -> PackedWeight:
    if kind == "float4":
        return shuffled_float4(weight)
    codes: torch.Tensor = SHUFFLE_WEIGHT(x=weight.codes.contiguous(), layout=(16, 16))
    scale = weight.scale if kind == "block" else per_channel_scale(weight)
    return PackedWeight(codes, scale.contiguous())
