"""Contracts of a mixture of experts: choosing experts, and applying them, prepared once, to tokens. Knows no layers.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRule:
    """How a token's experts and their weights follow from the router's logits.

    Scores of all experts; those with the highest score plus bias are chosen; their scores, without bias, are weights.
    """

    experts_per_token: int
    score: Literal["softmax", "softmax_of_chosen", "sigmoid", "sqrt_softplus"] = "softmax"
    """softmax_of_chosen: experts are chosen by their logits, and the softmax is over the chosen ones alone."""
    renormalize: bool = False
    """Weights of a token are divided by their sum, plus `renorm_eps`."""
    renorm_eps: float = 0.0
    scale: float = 1.0
    """Factor of weights, applied last."""
    num_groups: int = 1
    """Experts come in so many groups of equal size; those of the best groups alone can be chosen."""
    topk_groups: int = 1
    """How many groups those are."""
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    """Score of a group: the best, or the sum of the two best, of its experts' scores plus biases."""


class RouteTokens(Protocol):
    """Chooses experts."""

    def __call__(
        self,
        logits_TE: torch.Tensor,
        bias_E: torch.Tensor | None,
        rule: RoutingRule,
        *,
        expert_TK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(expert_TK int64, weight_TK in the dtype of the logits, which is float32 or wider).

        E are all experts of the layer, on whatever rank. bias_E, in the same dtype, counts for the choice alone.
        expert_TK: experts that are chosen already, so that only weights follow from the logits; bias_E is None then.
        """
        ...


class ExpertsOp(Protocol):
    """Experts of one layer that were prepared for one backend."""

    @property
    def name(self) -> str:
        """What became of the weights, for the start-up log: `bfloat16 x 8 experts`."""
        ...

    def __call__(
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        *,
        addend_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum over k of weight_TK[t, k] * expert_TK[t, k](x_TD[t]), [T, D] in the dtype of the input, which is kept.

        expert_TK: int64, in [0, E], where E stands for an expert that is not on this rank and contributes nothing. A
        token names an expert at most once, E aside. weight_TK: float32 or wider. addend_TD: added to the sum.
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
