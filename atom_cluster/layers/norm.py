"""RMS norm layer, replicated on every rank. Knows no models."""

from __future__ import annotations

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.parallel.sharding import WeightPart


class RmsNorm:
    """Normalises the last dimension."""

    def __init__(self, context: LayerContext, *, size: int, eps: float) -> None:
        self._ops = context.ops
        self._eps = eps
        self._weight_D = torch.empty(size, dtype=context.dtype, device=context.device)

    def weight_parts(self, name: str) -> dict[str, WeightPart]:
        """Where the checkpoint's tensor goes, by its name."""
        return {f"{name}.weight": WeightPart(target=self._weight_D, full_shape=tuple(self._weight_D.shape))}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]"""
        return self._ops.rms_norm(x, self._weight_D, self._eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual); `residual` may be overwritten."""
        return self._ops.add_rms_norm(x, residual, self._weight_D, self._eps)
