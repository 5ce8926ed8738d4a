"""Contract of RMS normalisation, alone and fused with the residual addition before it. Knows no layers."""

from __future__ import annotations

from typing import Protocol

import torch


class RmsNorm(Protocol):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __call__(self, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """[..., D] -> [..., D], same dtype, contiguous. The mean is taken in float32 or wider.

        `x` may be a strided view. A weight of a wider dtype than that of `x` is multiplied with in it; only the product
        is rounded.
        """
        ...


class AddRmsNorm(Protocol):
    """Adds a layer's output to the residual stream and normalises the sum."""

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """([..., D], [..., D]) -> (normalised sum, sum). May overwrite `residual`; the caller uses the results only.

        The weight as in `RmsNorm`; what is normalised is the sum in the dtype of `x`.
        """
        ...
