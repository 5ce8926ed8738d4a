"""The scheme of weights stored as plain floats."""

from __future__ import annotations

import torch

from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.table import OpTable
from atom_cluster.quantization.scheme import LinearScheme


class Unquantized:
    """One tensor `weight` per linear layer, in a float dtype."""

    name = "none"

    def create_tensors(
        self, num_out: int, num_in: int, *, dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """The weight, [num_out, num_in]."""
        return {"weight": torch.empty(num_out, num_in, dtype=dtype, device=device)}

    def prepare(
        self, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None, *, ops: OpTable, dtype: torch.dtype
    ) -> LinearOp:
        """Whatever the op backend makes of the weight."""
        return ops.prepare_linear(tensors["weight"], bias, dtype=dtype)


UNQUANTIZED: LinearScheme = Unquantized()
