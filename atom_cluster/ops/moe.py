"""Contract of a mixture of experts: weights prepared once, then applied to routed tokens. Knows no routers, no layers.

Shape suffixes: T tokens, D hidden dims, E experts on this rank, I intermediate dims of this rank, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertActivation:
    """What stands between an expert's two matrices. gate and up are the halves of the first one's output."""

    kind: Literal["silu", "swiglu_oai"] = "silu"
    """silu: silu(gate) * up. swiglu_oai: (up + 1) * gate * sigmoid(alpha * gate)."""
    alpha: float = 1.702
    """Of swiglu_oai."""
    limit: float | None = None
    """Clamp before the activation: gate from above, up from both sides."""


class ExpertsOp(Protocol):
    """Experts of one layer that were prepared for one backend."""

    @property
    def name(self) -> str:
        """What became of the weights, for the start-up log: `8 experts bfloat16`."""
        ...

    def __call__(self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Sum over k of weight_TK[t, k] * expert_TK[t, k](x_TD[t]), [T, D] in the dtype of the input, which is kept.

        expert_TK: int64, in [0, E], where E stands for an expert that is not on this rank and contributes nothing. A
        token names an expert at most once, E aside. weight_TK: float32.
        """
        ...


class PrepareExperts(Protocol):
    """Makes an ExpertsOp of loaded weights. Callers drop their references."""

    def __call__(
        self,
        gate_up_EOD: torch.Tensor,
        down_EDI: torch.Tensor,
        *,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        activation: ExpertActivation,
        dtype: torch.dtype,
    ) -> ExpertsOp:
        """Prepare [E, 2 I, D] (gate first, then up) and [E, D, I] weights of any float dtype for inputs of `dtype`.

        Biases are [E, 2 I] and [E, D].
        """
        ...
