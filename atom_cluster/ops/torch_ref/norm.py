"""Reference RMS norms, written out."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) in float32 or wider, rounded to the wider of its and the weight's dtypes, times it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    product = normalised.to(torch.promote_types(x.dtype, weight_D.dtype)) * weight_D
    return product.to(x.dtype).contiguous()


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the sum, sum)."""
    total = x + residual
    return rms_norm(total, weight_D, eps), total
