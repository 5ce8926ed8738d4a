"""Contract of the gated activation of an MLP. Knows no layers."""

from __future__ import annotations

from typing import Protocol

import torch


class GateAndMul(Protocol):
    """activation(gate) * up, with an activation that the field of the table names."""

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[..., 2 I], gate first, -> [..., I] in the same dtype. May overwrite its input."""
        ...
