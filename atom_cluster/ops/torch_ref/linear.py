"""Reference linear op: the weight in the dtype of the activations. Knows no packing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atom_cluster.ops.linear import LinearOp


class PlainLinear:
    """`x @ weight.T + bias`, in the weight's dtype."""

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


class WideningLinear(PlainLinear):
    """Sums of half-precision products, given in float32."""

    @property
    def name(self) -> str:
        """The weight's dtype, and that of results."""
        return f"{super().name} to float32"

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out] float32."""
        if self._weight_OI.is_cuda:
            y = torch.mm(x_TI, self._weight_OI.T, out_dtype=torch.float32)
        else:
            y = x_TI.float() @ self._weight_OI.float().T
        return y if self._bias_O is None else y.add_(self._bias_O)


def prepare_linear(
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
) -> LinearOp:
    """Convert to `dtype`; a weight that already has it is used as it is, shared with whoever else holds it."""
    if out_dtype is None or out_dtype == dtype:
        return PlainLinear(weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
    assert out_dtype == torch.float32, "results are of the inputs' dtype or float32"
    return WideningLinear(weight_OI.to(dtype), None if bias_O is None else bias_O.float())
