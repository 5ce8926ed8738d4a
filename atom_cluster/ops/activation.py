"""Contracts of gates: the activation of an MLP, and a sigmoid that multiplies an output. Knows no layers."""

from __future__ import annotations

from typing import Protocol

import torch


class GateAndMul(Protocol):
    """activation(gate) * up, with an activation that the field of the table names."""

    def __call__(self, gate_up: torch.Tensor, limit: float | None = None) -> torch.Tensor:
        """[..., 2 I], gate first, -> [..., I] in the same dtype. May overwrite its input.

        limit: what goes in is clamped first, the gate to at most it, up to between minus it and it; None: no clamp.
        """
        ...


class SigmoidAndMul(Protocol):
    """sigmoid(gate) * x, and optionally added to something."""

    def __call__(self, x: torch.Tensor, gate: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """[..., D] -> the same, contiguous, in the dtype of `x`. `gate` is [..., D] or [..., 1], and may be a strided
        view; `addend` has the shape of `x`."""
        ...
