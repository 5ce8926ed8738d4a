"""Contract of products with quantized weights: what a quantized weight means, and how inputs are rounded for it.

Weights of all checkpoint formats arrive in this one form. Knows no checkpoints and no layers. Dims in front of those
named here are experts. O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertActivation, ExpertsOp
from atom_cluster.ops.number_formats import (
    NumberFormat,
    ScaleFormat,
    e8m0_values,
    float4_values,
    unpack_nibbles,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputQuantization:
    """How inputs are rounded before the product: to `number`, with a scale per token or per group of its inputs."""

    number: NumberFormat
    """float8 of the weight's float8 dtype if it has one."""
    group_size: int | None = None
    """Consecutive inputs of a token that share a scale, from this rank's first on; None: all."""
    scale_format: ScaleFormat = "float32"
    max_abs: float | None = None
    """Magnitudes above it do not enlarge the scale, and are rounded down."""
    is_static: bool = False
    """One scale for all tokens and inputs, known beforehand: `QuantizedWeight.input_scale`."""

    @property
    def name(self) -> str:
        """For the start-up log: `float8 per token`."""
        if self.is_static:
            return f"{self.number} static"
        kind = "" if self.scale_format == "float32" else f" {self.scale_format}"
        return f"{self.number} per {self.group_size or 'token'}{kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A weight [O, I]: `(code - zero) * scale`."""

    number: NumberFormat
    codes: torch.Tensor
    """[O, I] float8 or int8; for four bits uint8 [O, I / 2], where int4 codes are 0..15."""
    scale: torch.Tensor
    """[ceil(O / block[0]), groups of inputs], float32, or uint8 that holds e8m0."""
    block: tuple[int, int]
    """Outputs and inputs that share a scale. The last ones may be fewer."""
    zero: torch.Tensor | None = None
    """What code means 0, of the shape of `scale`, int16, or float16 where it may lie between codes. None: 8 for int4, 0
    otherwise."""
    input_group: torch.Tensor | None = None
    """[I] int64: the group of each input, when they are not consecutive."""
    inputs: InputQuantization | None = None
    """None: inputs are used as they are."""
    input_scale: torch.Tensor | None = None
    """[] float32, for static input quantization."""

    @property
    def num_out(self) -> int:
        """Outputs."""
        return self.codes.shape[-2]

    @property
    def num_in(self) -> int:
        """Inputs."""
        return self.codes.shape[-1] * (2 if self.number in ("int4", "float4") else 1)

    @property
    def name(self) -> str:
        """For the start-up log: `float8 128x128 (inputs float8 per 128)`."""
        rows, columns = self.block
        group = f"{rows}x{columns}"
        if columns >= self.num_in:
            group = "per channel" if rows == 1 else "per tensor" if rows >= self.num_out else group
        return f"{self.number} {group}" if self.inputs is None else f"{self.number} {group} (inputs {self.inputs.name})"

    def expert(self, index: int) -> QuantizedWeight:
        """The weight of one of stacked experts; shares memory."""
        return replace(
            self,
            codes=self.codes[index],
            scale=self.scale[index],
            zero=None if self.zero is None else self.zero[index],
            input_group=None if self.input_group is None else self.input_group[index],
            input_scale=None if self.input_scale is None else self.input_scale[index],
        )


def dequantize(weight: QuantizedWeight, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
    """The numbers that a weight, or some of its outputs, stands for: [..., O, I] of `dtype`, float32 or wider."""
    number, codes = weight.number, weight.codes[..., rows, :]
    if number in ("int4", "float4"):
        codes = unpack_nibbles(codes)
    values = float4_values(codes, dtype) if number == "float4" else codes.to(dtype)
    zero: torch.Tensor | int | None = 8 if number == "int4" else None
    if weight.zero is not None:
        zero = _spread(weight.zero.to(dtype), weight, rows)
    if zero is not None:
        values -= zero
    scale = e8m0_values(weight.scale, dtype) if weight.scale.dtype == torch.uint8 else weight.scale.to(dtype)
    return values.mul_(_spread(scale, weight, rows))


def _spread(per_block: torch.Tensor, weight: QuantizedWeight, rows: slice) -> torch.Tensor:
    """What blocks have, for each output and input, or once where it is the same for all of them."""
    block_rows, block_columns = weight.block
    device = per_block.device
    if block_rows == 1:
        per_block = per_block[..., rows, :]
    elif per_block.shape[-2] > 1:
        per_block = per_block[..., torch.arange(weight.num_out, device=device)[rows] // block_rows, :]
    if weight.input_group is not None:
        if weight.input_group.dim() > 1:
            index = weight.input_group[:, None].expand(-1, per_block.shape[-2], -1)
            return per_block.gather(-1, index)
        return per_block[..., weight.input_group]
    if per_block.shape[-1] > 1:
        return per_block[..., torch.arange(weight.num_in, device=device) // block_columns]
    return per_block


class PrepareQuantizedLinear(Protocol):
    """Makes a LinearOp of a quantized weight. Callers drop their references."""

    def __call__(self, weight: QuantizedWeight, bias_O: torch.Tensor | None, *, dtype: torch.dtype) -> LinearOp:
        """For inputs of `dtype`. The weight stays quantized in memory."""
        ...


class PrepareQuantizedExperts(Protocol):
    """Makes an ExpertsOp of quantized weights. Callers drop their references."""

    def __call__(
        self,
        gate_up: QuantizedWeight,
        down: QuantizedWeight,
        *,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        activation: ExpertActivation,
        dtype: torch.dtype,
    ) -> ExpertsOp:
        """For inputs of `dtype`; the inputs of both products are rounded as their weights say.

        Shapes are those of `PrepareExperts`.
        """
        ...
