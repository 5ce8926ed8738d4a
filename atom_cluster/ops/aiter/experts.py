"""Experts by AITER's fused mixture of experts. Knows no layers.

Weights are brought into the order of the matrix units' operands once, when they are prepared. What AITER has no kernel
for is left to the backend that it was given: biases, activations other than silu, numbers and sizes of another kind.
"""

from __future__ import annotations

from typing import Any

import torch

from atom_cluster.ops.aiter.binding import HALF_DTYPES, AiterFunction, enum_member
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
from atom_cluster.ops.moe import ExpertActivation, ExpertsOp, PrepareExperts
from atom_cluster.ops.quantized import PrepareQuantizedExperts, QuantizedWeight

FUSED_MOE = AiterFunction(
    "aiter.fused_moe",
    "fused_moe",
    "hidden_states",
    "w1",
    "w2",
    "topk_weight",
    "topk_ids",
    "expert_mask",
    "activation",
    "quant_type",
    "w1_scale",
    "w2_scale",
)
FUNCTIONS = (FUSED_MOE, SHUFFLE_WEIGHT)
FLOAT4_FUNCTIONS = (SHUFFLE_SCALE,)

_QUANT_TYPES: dict[QuantizedKind, str] = {
    "block": "per_128x128",
    "token": "per_Token",
    "float4": "per_1x32",
}
_SILU = ExpertActivation()


class FusedExperts:
    """Both products, the activation and the weighted sum, of tokens sorted by expert."""

    def __init__(self, gate_up: PackedWeight, down: PackedWeight, quant_type: str, name: str) -> None:
        self.name = name
        self._gate_up, self._down = gate_up, down
        self._quant_type: Any = enum_member("QuantType", quant_type)
        self._activation: Any = enum_member("ActivationType", "Silu")
        num_experts, device = len(down.codes), down.codes.device
        # The last one has no weights: the number of experts stands for those of other ranks.
        self._expert_mask = torch.ones(num_experts + 1, dtype=torch.int32, device=device)
        self._expert_mask[-1:].zero_()

    def __call__(
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        *,
        addend_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, D] -> [T, D]"""
        if len(x_TD) == 0:
            return torch.empty_like(x_TD)
        y_TD: torch.Tensor = FUSED_MOE(
            hidden_states=x_TD.contiguous(),
            w1=self._gate_up.codes,
            w2=self._down.codes,
            topk_weight=weight_TK.to(torch.float32),
            topk_ids=expert_TK.to(torch.int32),
            expert_mask=self._expert_mask,
            activation=self._activation,
            quant_type=self._quant_type,
            w1_scale=self._gate_up.scale,
            w2_scale=self._down.scale,
        )
        return y_TD if addend_TD is None else y_TD.add_(addend_TD)


def experts_preparer(fallback: PrepareExperts) -> PrepareExperts:
    """Experts with weights of half precision; others are prepared by `fallback`."""

    def prepare_experts(
        gate_up_EOD: torch.Tensor,
        down_EDI: torch.Tensor,
        *,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        activation: ExpertActivation,
        dtype: torch.dtype,
    ) -> ExpertsOp:
        is_plain = gate_up_bias is None and down_bias is None and activation == _SILU and dtype in HALF_DTYPES
        if not is_plain or not all(can_be_shuffled(weight) for weight in (gate_up_EOD, down_EDI)):
            return fallback(
                gate_up_EOD,
                down_EDI,
                gate_up_bias=gate_up_bias,
                down_bias=down_bias,
                activation=activation,
                dtype=dtype,
            )
        gate_up, down = (PackedWeight(shuffled(weight.to(dtype))) for weight in (gate_up_EOD, down_EDI))
        name = f"{str(dtype).removeprefix('torch.')} x {len(down_EDI)} experts, shuffled (aiter)"
        return FusedExperts(gate_up, down, "No", name)

    return prepare_experts


def quantized_experts_preparer(
    fallback: PrepareQuantizedExperts, *, float8_dtype: torch.dtype, has_float4: bool
) -> PrepareQuantizedExperts:
    """Experts with weights in eight or four bits; others are prepared by `fallback`.

    has_float4: whether the chip multiplies four-bit numbers.
    """

    def prepare_quantized_experts(
        gate_up: QuantizedWeight,
        down: QuantizedWeight,
        *,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        activation: ExpertActivation,
        dtype: torch.dtype,
    ) -> ExpertsOp:
        kinds = {quantized_kind(weight, float8_dtype, has_float4=has_float4) for weight in (gate_up, down)}
        kind = kinds.pop() if len(kinds) == 1 else None
        is_plain = gate_up_bias is None and down_bias is None and activation == _SILU and dtype in HALF_DTYPES
        if kind is None or not is_plain or not _fits(gate_up, kind) or not _fits(down, kind):
            return fallback(
                gate_up, down, gate_up_bias=gate_up_bias, down_bias=down_bias, activation=activation, dtype=dtype
            )
        name = f"{down.name} x {len(down.codes)} experts, shuffled (aiter)"
        return FusedExperts(_packed(gate_up, kind), _packed(down, kind), _QUANT_TYPES[kind], name)

    return prepare_quantized_experts


def shuffled(weight: torch.Tensor) -> torch.Tensor:
    """In the order of the matrix units' operands. The result has an attribute that AITER looks for: keep the object."""
    result: torch.Tensor = SHUFFLE_WEIGHT(x=weight.contiguous(), layout=(16, 16))
    return result


def _fits(weight: QuantizedWeight, kind: QuantizedKind) -> bool:
    if kind == "float4":
        # Scales are shuffled by 256 outputs of all experts together, and by 8 groups of inputs.
        return can_be_shuffled(weight.codes) and weight.num_out % 256 == 0 and weight.num_in % 256 == 0
    is_whole = kind == "token" or (weight.num_out % 128 == 0 and weight.num_in % 128 == 0)
    return can_be_shuffled(weight.codes) and is_whole


def _packed(weight: QuantizedWeight, kind: QuantizedKind) -> PackedWeight:
    if kind == "float4":
        return shuffled_float4(weight)
    scale = weight.scale if kind == "block" else per_channel_scale(weight)
    return PackedWeight(shuffled(weight.codes), scale.to(torch.float32).contiguous())
