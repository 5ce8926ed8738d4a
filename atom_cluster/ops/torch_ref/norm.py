"""Reference RMS norms, written out."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) in float32 or wider, rounded to the dtype of `x`, times the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight_D


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the sum, sum)."""
    total = x + residual
    return rms_norm(total, weight_D, eps), total
