"""The scheme of weights stored as plain floats."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertActivation, ExpertsOp
from atom_cluster.ops.table import OpTable
from atom_cluster.quantization.scheme import LinearScheme, LinearShape, QuantizationPlan, StoredTensor


class Unquantized:
    """One tensor `weight` per projection, in a float dtype."""

    name = "none"

    def create_tensors(
        self, shape: LinearShape, *, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, StoredTensor]:
        """The weight, [out, in]."""
        tensor = torch.empty(*shape.stack, shape.num_out, shape.num_in, dtype=dtype, device=device)
        return {"weight": StoredTensor(tensor=tensor, out_axis=0, in_axis=1)}

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
        return ops.prepare_linear(tensors["weight"], bias, dtype=dtype)

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], *, shape: LinearShape, dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight itself."""
        return tensors["weight"].to(dtype)

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
        return ops.prepare_experts(
            gate_up["weight"],
            down["weight"],
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            activation=activation,
            dtype=dtype,
        )


class NothingQuantized:
    """The plan of a checkpoint of plain floats."""

    ignored: tuple[str, ...] = ()

    def linear(self, name: str) -> LinearScheme:
        """Plain floats, whatever the name."""
        return UNQUANTIZED


UNQUANTIZED: LinearScheme = Unquantized()
NOTHING_QUANTIZED: QuantizationPlan = NothingQuantized()
