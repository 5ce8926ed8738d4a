"""Rounds float weights to quantized ones. Knows no checkpoints and no layers.

Each function takes a weight [out, in] in float32 and returns it in the ops' form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from atom_cluster.errors import ConfigError
from atom_cluster.ops.number_formats import (
    e8m0_codes,
    float4_codes,
    largest,
    pack_nibbles,
    scale_for,
    to_float8,
)
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight

_BLOCK = 128
_GROUP = 32
"""Inputs that share a scale in mxfp8, mxfp4 and int4."""
_STEPS_PER_OCTAVE = 8
"""Scales that the search of fp8 tries."""
_INT4_LEVELS = 15
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a group's range that the search of int4 tries."""


def quantize_fp8(weight_OI: torch.Tensor) -> QuantizedWeight:
    """A scale per output; inputs per token."""
    scale = _float8_scale(weight_OI, (1,))
    return QuantizedWeight(
        number="float8",
        codes=to_float8(weight_OI / scale, torch.float8_e4m3fn),
        scale=scale,
        block=(1, weight_OI.shape[1]),
        inputs=InputQuantization(number="float8"),
    )


def quantize_fp8_block(weight_OI: torch.Tensor) -> QuantizedWeight:
    """A scale per 128x128 block; inputs per 128."""
    num_out, num_in = weight_OI.shape
    padded = F.pad(weight_OI, (0, -num_in % _BLOCK, 0, -num_out % _BLOCK))
    blocks = padded.reshape(len(padded) // _BLOCK, _BLOCK, -1, _BLOCK)
    scale = _float8_scale(blocks, (1, 3))
    scaled = (blocks / scale).flatten(2).flatten(0, 1)[:num_out, :num_in]
    return QuantizedWeight(
        number="float8",
        codes=to_float8(scaled, torch.float8_e4m3fn).contiguous(),
        scale=scale[:, 0, :, 0],
        block=(_BLOCK, _BLOCK),
        inputs=InputQuantization(number="float8", group_size=_BLOCK),
    )


def _float8_scale(weight: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The scale for what `dims` has, which are kept: of one octave from the smallest on, that with the least error.

    Larger scales lose no precision but of the very smallest numbers, and move all others to where steps fit better.
    """
    smallest = scale_for(weight.abs().amax(dims, keepdim=True), largest("float8"))
    best_scale, best_error = smallest, torch.full_like(smallest, torch.inf)
    for step in range(_STEPS_PER_OCTAVE):
        scale = smallest * 2 ** (step / _STEPS_PER_OCTAVE)
        rounded = to_float8(weight / scale, torch.float8_e4m3fn).to(weight.dtype)
        error = (rounded * scale - weight).square_().sum(dims, keepdim=True)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return best_scale


def quantize_int8(weight_OI: torch.Tensor) -> QuantizedWeight:
    """A scale per output; inputs per token."""
    scale = scale_for(weight_OI.abs().amax(-1, keepdim=True), largest("int8"))
    return QuantizedWeight(
        number="int8",
        codes=(weight_OI / scale).round().to(torch.int8),
        scale=scale,
        block=(1, weight_OI.shape[1]),
        inputs=InputQuantization(number="int8"),
    )


def quantize_mxfp8(weight_OI: torch.Tensor) -> QuantizedWeight:
    """Groups of 32 inputs share a power of two; so do inputs."""
    groups = _grouped(weight_OI, "mxfp8")
    scale = scale_for(groups.abs().amax(-1, keepdim=True), largest("float8"), "e8m0")
    return QuantizedWeight(
        number="float8",
        codes=to_float8(groups / scale, torch.float8_e4m3fn).flatten(1),
        scale=e8m0_codes(scale.squeeze(-1)),
        block=(1, _GROUP),
        inputs=InputQuantization(number="float8", group_size=_GROUP, scale_format="e8m0"),
    )


def quantize_mxfp4(weight_OI: torch.Tensor) -> QuantizedWeight:
    """Groups of 32 inputs share a power of two; inputs as they are."""
    groups = _grouped(weight_OI, "mxfp4")
    scale = scale_for(groups.abs().amax(-1, keepdim=True), largest("float4"), "e8m0")
    return QuantizedWeight(
        number="float4",
        codes=pack_nibbles(float4_codes(groups / scale).flatten(1)),
        scale=e8m0_codes(scale.squeeze(-1)),
        block=(1, _GROUP),
    )


def quantize_int4(weight_OI: torch.Tensor) -> QuantizedWeight:
    """Groups of 32 inputs, each with a scale and a zero point that may lie between codes; inputs as they are.

    Of several ranges around its middle, each group takes the one with the least squared error, when scale and zero
    point are those that fit the range's codes best.
    """
    groups = _grouped(weight_OI, "int4")
    # Zero is in the range, so that zero points stay small.
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    best: tuple[torch.Tensor, ...] | None = None
    for shrink in _SHRINKS:
        margin = (high - low) * (1 - shrink) / 2
        found = _fit_int4(groups, low + margin, high - margin)
        if best is None:
            best = found
        else:
            is_better = found[0] < best[0]
            best = tuple(torch.where(is_better, new, old) for new, old in zip(found, best))
    assert best is not None
    _, codes, scale, zero = best
    return QuantizedWeight(
        number="int4",
        codes=pack_nibbles(codes.to(torch.uint8).flatten(1)),
        scale=scale.squeeze(-1),
        block=(1, _GROUP),
        zero=zero.squeeze(-1).half(),
    )


def _fit_int4(
    groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared error, codes, scale and zero point for a range per group: a line through codes and weights."""
    step = torch.where(high > low, (high - low) / _INT4_LEVELS, 1.0)
    codes = ((groups - low) / step).round().clamp(0, _INT4_LEVELS)
    mean_code, mean = codes.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
    spread = (codes - mean_code).square().sum(-1, keepdim=True)
    slope = ((codes - mean_code) * (groups - mean)).sum(-1, keepdim=True) / spread.clamp(min=1e-6)
    scale = torch.where(slope > 0, slope, step)
    zero = mean_code - mean / scale
    error = ((codes - zero) * scale - groups).square().sum(-1, keepdim=True)
    return error, codes, scale, zero


def _grouped(weight_OI: torch.Tensor, format_name: str) -> torch.Tensor:
    """[out, groups, 32]"""
    num_out, num_in = weight_OI.shape
    if num_in % _GROUP != 0:
        raise ConfigError(f"quantization.online: {format_name} needs inputs in multiples of {_GROUP}, not {num_in}")
    return weight_OI.reshape(num_out, -1, _GROUP)


QUANTIZERS: dict[str, Callable[[torch.Tensor], QuantizedWeight]] = {
    "fp8": quantize_fp8,
    "fp8_block": quantize_fp8_block,
    "int8": quantize_int8,
    "int4": quantize_int4,
    "mxfp4": quantize_mxfp4,
    "mxfp8": quantize_mxfp8,
}
"""By the name in configurations."""


def stack_experts(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of one format, stacked."""
    zeros = [weight.zero for weight in weights if weight.zero is not None]
    return replace(
        weights[0],
        codes=torch.stack([weight.codes for weight in weights]),
        scale=torch.stack([weight.scale for weight in weights]),
        zero=torch.stack(zeros) if zeros else None,
    )
