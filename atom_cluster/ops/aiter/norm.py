"""RMS norms by AITER. Knows no layers.

Strided inputs, weights wider than the inputs and dtypes that AITER does not know are left to the backend that it was
given.
"""

from __future__ import annotations

import torch

from atom_cluster.ops.aiter.binding import HALF_DTYPES, AiterFunction
from atom_cluster.ops.norm import AddRmsNorm, RmsNorm

NORM = AiterFunction("aiter.ops.rmsnorm", "rmsnorm2d_fwd", "input", "weight", "epsilon")
ADD_NORM = AiterFunction(
    "aiter.ops.rmsnorm",
    "rmsnorm2d_fwd_with_add",
    "out",
    "input",
    "residual_in",
    "residual_out",
    "weight",
    "epsilon",
)
FUNCTIONS = (NORM, ADD_NORM)


def rms_norm_op(fallback: RmsNorm) -> RmsNorm:
    """The norm of contiguous rows of half precision; others are left to `fallback`."""

    def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        if not _is_plain(x, weight_D):
            return fallback(x, weight_D, eps)
        normalised: torch.Tensor = NORM(input=x.view(-1, x.shape[-1]), weight=weight_D, epsilon=eps)
        return normalised.view(x.shape)

    return rms_norm


def add_rms_norm_op(fallback: AddRmsNorm) -> AddRmsNorm:
    """The same behind an addition; the sum replaces the residual."""

    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not _is_plain(x, weight_D) or not residual.is_contiguous() or residual.dtype != x.dtype:
            return fallback(x, residual, weight_D, eps)
        normalised = torch.empty_like(x)
        rows = [tensor.view(-1, x.shape[-1]) for tensor in (normalised, x, residual)]
        ADD_NORM(out=rows[0], input=rows[1], residual_in=rows[2], residual_out=rows[2], weight=weight_D, epsilon=eps)
        return normalised, residual

    return add_rms_norm


def _is_plain(x: torch.Tensor, weight_D: torch.Tensor) -> bool:
    return x.dtype in HALF_DTYPES and weight_D.dtype == x.dtype and x.is_contiguous() and x.numel() > 0
