"""Which weights AITER has kernels for, and the layouts it wants them in. Knows no layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from atom_cluster.ops.aiter.binding import AiterFunction
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight

SHUFFLE_WEIGHT = AiterFunction("aiter.ops.shuffle", "shuffle_weight", "x", "layout")
SHUFFLE_SCALE = AiterFunction("aiter.utility.fp4_utils", "e8m0_shuffle", "scale")

QuantizedKind = Literal["block", "token", "float4"]
"""block: float8 with a scale per 128 x 128 weights and per 128 inputs of a token. token: float8 with a scale per output
and per token. float4: microscaling, e8m0 scales per 32 of both."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in AITER's layout."""

    codes: torch.Tensor
    scale: torch.Tensor | None = None


def quantized_kind(weight: QuantizedWeight, float8_dtype: torch.dtype, *, has_float4: bool) -> QuantizedKind | None:
    """How AITER knows a weight; None: not at all."""
    inputs = weight.inputs
    if inputs is None or inputs.is_static or weight.zero is not None or weight.input_group is not None:
        return None
    if inputs.max_abs is not None or inputs.number != weight.number:
        return None
    if weight.number == "float4":
        return "float4" if has_float4 and weight.block == (1, 32) and _is_microscaling(weight, inputs) else None
    is_float8 = weight.number == "float8" and weight.codes.dtype == float8_dtype
    if not is_float8 or weight.scale.dtype != torch.float32 or inputs.scale_format != "float32":
        return None
    if weight.block == (128, 128) and inputs.group_size == 128:
        return "block"
    return "token" if weight.block[1] >= weight.num_in and inputs.group_size is None else None


def _is_microscaling(weight: QuantizedWeight, inputs: InputQuantization) -> bool:
    return weight.scale.dtype == torch.uint8 and inputs.group_size == 32 and inputs.scale_format == "e8m0"


def can_be_shuffled(weight: torch.Tensor) -> bool:
    """Whether [..., O, I] consists of whole tiles of 16 outputs and 32 stored inputs."""
    return weight.shape[-2] % 16 == 0 and weight.shape[-1] % 32 == 0


def per_channel_scale(weight: QuantizedWeight) -> torch.Tensor:
    """A scale for each output, [..., O, 1], of a weight whose scales are for some outputs and all inputs."""
    row = torch.arange(weight.num_out, device=weight.scale.device) // weight.block[0]
    return weight.scale[..., row, :]


def shuffled_float4(weight: QuantizedWeight) -> PackedWeight:
    """Microscaling: pairs of codes as `float4_e2m1fn_x2`; scales of all experts' outputs in one matrix, shuffled."""
    codes: torch.Tensor = SHUFFLE_WEIGHT(x=weight.codes.view(torch.float4_e2m1fn_x2), layout=(16, 16))
    scale: torch.Tensor = SHUFFLE_SCALE(scale=weight.scale.flatten(0, -2).view(torch.float8_e8m0fnu))
    return PackedWeight(codes, scale)
