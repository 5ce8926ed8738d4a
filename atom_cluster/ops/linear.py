"""Contract of the linear op: weights are prepared once after loading, then applied every step. Knows no layers."""

from __future__ import annotations

from typing import Protocol

import torch


class LinearOp(Protocol):
    """A matrix product with weights that were prepared for one backend."""

    @property
    def name(self) -> str:
        """What became of the weight, for the start-up log: `float32`, `packed float16`."""
        ...

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out], plus the bias if there is one, of the out dtype it was made for. The input is kept."""
        ...


class PrepareLinear(Protocol):
    """Makes a LinearOp of a loaded weight. Callers drop their reference, so a packed copy replaces the original."""

    def __call__(
        self,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        *,
        dtype: torch.dtype,
        out_dtype: torch.dtype | None = None,
    ) -> LinearOp:
        """Prepare [out, in] weights, stored in any float dtype, for inputs of `dtype`. Does not change `weight_OI`.

        out_dtype: `dtype` (None means the same), or float32 for sums that are not rounded to half precision; the
        weights are rounded to `dtype` in any case.
        """
        ...
