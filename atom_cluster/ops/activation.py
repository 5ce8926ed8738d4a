"""Contract of the gated activation of an MLP. Knows no layers."""

from __future__ import annotations

from typing import Protocol

import torch


class SiluAndMul(Protocol):
    """silu(gate) * up."""

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[..., 2 I], gate first, -> [..., I] in the same dtype. May overwrite its input."""
        ...
