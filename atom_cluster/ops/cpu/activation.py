"""Gated activation for CPUs: one temporary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atom_cluster.ops.torch_ref.activation import clamped_halves


def silu_and_mul(gate_up: torch.Tensor, limit: float | None = None) -> torch.Tensor:
    """silu(gate) * up."""
    gate, up = clamped_halves(gate_up, limit)
    return F.silu(gate).mul_(up)
