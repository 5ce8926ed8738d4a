"""Products with weights of half precision, by the kernels that AITER's tuning found best. Knows no layers."""

from __future__ import annotations

import torch

from atom_cluster.ops.aiter.binding import HALF_DTYPES, AiterFunction
from atom_cluster.ops.linear import LinearOp, PrepareLinear

MULTIPLY = AiterFunction("aiter.tuned_gemm", "gemm_a16w16", "A", "B", "bias", "otype")
FUNCTIONS = (MULTIPLY,)


class TunedLinear:
    """`x @ weight.T + bias`."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self._weight_OI, self._bias_O = weight_OI, bias_O

    @property
    def name(self) -> str:
        """The weight's dtype."""
        return f"{str(self._weight_OI.dtype).removeprefix('torch.')} (aiter)"

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]"""
        if len(x_TI) == 0:
            return x_TI.new_empty(0, len(self._weight_OI))
        y_TO: torch.Tensor = MULTIPLY(A=x_TI.contiguous(), B=self._weight_OI, bias=self._bias_O, otype=x_TI.dtype)
        return y_TO


def linear_preparer(fallback: PrepareLinear) -> PrepareLinear:
    """Linear ops of half precision; others are prepared by `fallback`."""

    def prepare_linear(
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        *,
        dtype: torch.dtype,
        out_dtype: torch.dtype | None = None,
    ) -> LinearOp:
        if dtype not in HALF_DTYPES or out_dtype not in (None, dtype):
            return fallback(weight_OI, bias_O, dtype=dtype, out_dtype=out_dtype)
        return TunedLinear(weight_OI.to(dtype).contiguous(), None if bias_O is None else bias_O.to(dtype))

    return prepare_linear
