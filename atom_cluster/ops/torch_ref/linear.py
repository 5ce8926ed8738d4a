"""Reference linear op: the weight in the dtype of the activations. Knows no packing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atom_cluster.ops.linear import LinearOp


class PlainLinear:
    """`x @ weight.T + bias`."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self._weight_OI = weight_OI
        self._bias_O = bias_O

    @property
    def name(self) -> str:
        """The weight's dtype."""
        return str(self._weight_OI.dtype).removeprefix("torch.")

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]."""
        return F.linear(x_TI, self._weight_OI, self._bias_O)


def prepare_linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None, *, dtype: torch.dtype) -> LinearOp:
    """Convert to `dtype`; a weight that already has it is used as it is, shared with whoever else holds it."""
    return PlainLinear(weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
