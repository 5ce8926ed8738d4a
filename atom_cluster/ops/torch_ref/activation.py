"""Reference gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul(gate_up: torch.Tensor, limit: float | None = None) -> torch.Tensor:
    """silu(gate) * up."""
    gate, up = clamped_halves(gate_up, limit)
    return F.silu(gate) * up


def gelu_tanh_and_mul(gate_up: torch.Tensor, limit: float | None = None) -> torch.Tensor:
    """gelu(gate) * up, with the tanh approximation of gelu."""
    gate, up = clamped_halves(gate_up, limit)
    return F.gelu(gate, approximate="tanh") * up


def sigmoid_and_mul(x: torch.Tensor, gate: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
    """sigmoid(gate) * x."""
    product = (x * torch.sigmoid(gate)).contiguous()
    return product if addend is None else product.add_(addend)


def clamped_halves(gate_up: torch.Tensor, limit: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, up), behind the clamp."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))
