"""RMS norms for CPUs: torch's own, and the addition in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    dtype = torch.promote_types(x.dtype, weight_D.dtype)
    return F.rms_norm(x.to(dtype), weight_D.shape, weight_D.to(dtype), eps).to(x.dtype).contiguous()


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the sum, sum); the sum replaces `residual`."""
    total = residual.add_(x)
    return rms_norm(total, weight_D, eps), total
