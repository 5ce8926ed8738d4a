"""QuantizedScheme: what all schemes with quantized weights have in common once their tensors are in the ops' form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from atom_cluster.errors import ConfigError
from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertActivation, ExpertsOp
from atom_cluster.ops.number_formats import FLOAT8_DTYPES, float8_to_fnuz
from atom_cluster.ops.quantized import QuantizedWeight, dequantize
from atom_cluster.ops.table import OpTable
from atom_cluster.quantization.scheme import LinearShape, StoredTensor


class QuantizedScheme:
    """A checkpoint format of quantized weights. Subclasses say what tensors it has and what they mean."""

    @property
    def name(self) -> str:
        """Equal for equal formats."""
        raise NotImplementedError

    @property
    def mark(self) -> str:
        """Suffix of a tensor that a weight has in this format, and does not have as plain floats."""
        raise NotImplementedError

    def create_tensors(
        self, shape: LinearShape, *, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, StoredTensor]:
        """Uninitialised tensors of a weight, by the suffix they have in checkpoints."""
        raise NotImplementedError

    def to_weight(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape) -> QuantizedWeight:
        """Loaded tensors in the ops' form. May share memory with them."""
        raise NotImplementedError

    def prepare(
        self,
        tensors: Mapping[str, torch.Tensor],
        bias: torch.Tensor | None,
        *,
        shape: LinearShape,
        ops: OpTable,
        dtype: torch.dtype,
    ) -> LinearOp:
        """Whatever the op backend makes of the weight."""
        return ops.prepare_quantized_linear(fit_hardware(self.to_weight(tensors, shape), ops), bias, dtype=dtype)

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], *, shape: LinearShape, dtype: torch.dtype
    ) -> torch.Tensor:
        """The numbers, [*stack, out, in]."""
        wide = torch.promote_types(dtype, torch.float32)
        return dequantize(self.to_weight(tensors, shape), wide).to(dtype)

    def prepare_experts(
        self,
        gate_up: Mapping[str, torch.Tensor],
        down: Mapping[str, torch.Tensor],
        *,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        activation: ExpertActivation,
        gate_up_shape: LinearShape,
        down_shape: LinearShape,
        ops: OpTable,
        dtype: torch.dtype,
    ) -> ExpertsOp:
        """Whatever the op backend makes of the weights."""
        return ops.prepare_quantized_experts(
            fit_hardware(self.to_weight(gate_up, gate_up_shape), ops),
            fit_hardware(self.to_weight(down, down_shape), ops),
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            activation=activation,
            dtype=dtype,
        )


def fit_hardware(weight: QuantizedWeight, ops: OpTable) -> QuantizedWeight:
    """The same weight in the float8 kind that the ops multiply."""
    if weight.codes.dtype not in FLOAT8_DTYPES or weight.codes.dtype == ops.float8_dtype:
        return weight
    codes, scale = float8_to_fnuz(weight.codes, weight.scale)
    input_scale = None if weight.input_scale is None else weight.input_scale * 2
    return replace(weight, codes=codes, scale=scale, input_scale=input_scale)


def check_packing(shape: LinearShape, *, out_unit: int = 1, in_unit: int = 1, format_name: str) -> None:
    """Raise ConfigError when a share of outputs or inputs begins or ends within what is packed into one number."""
    for what, shares, unit in (("outputs", shape.outputs, out_unit), ("inputs", (shape.inputs,), in_unit)):
        for share in shares:
            if share.full_size % unit != 0:
                raise ConfigError(
                    f"{format_name}: {share.full_size} {what} of a projection are not a multiple of {unit}"
                )
            if share.common_unit(unit) != unit:
                where = f"{what} {share.span.start} to {share.span.stop} of {share.full_size}"
                instead = "" if shape.num_experts is None else ", or parallel.expert, which leaves experts whole"
                raise ConfigError(
                    f"{format_name} packs {unit} {what} together, and a rank would have {where}: choose a smaller "
                    f"parallel.tensor, with which shares are multiples of {unit}{instead}"
                )


def scale_per_row(scale_P: torch.Tensor, shape: LinearShape) -> tuple[torch.Tensor, tuple[int, int]]:
    """One scale per projection, [*stack, P], as the ops want it: one for all, or one per output. With its block."""
    if len(shape.part_sizes) == 1:
        return scale_P[..., None], (shape.num_out, shape.num_in)
    return spread_over_parts(scale_P, shape), (1, shape.num_in)


def spread_over_parts(per_part_P: torch.Tensor, shape: LinearShape) -> torch.Tensor:
    """[*stack, P] -> [*stack, outputs, 1]"""
    sizes = torch.tensor(shape.part_sizes, device=per_part_P.device)
    return per_part_P.repeat_interleave(sizes, dim=-1)[..., None]
