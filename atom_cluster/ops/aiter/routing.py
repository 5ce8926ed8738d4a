"""The choice of experts by AITER. Knows no layers.

It has kernels for two kinds of rule: softmax over all experts, and sigmoid with a bias for the choice, in groups or
not. Others are left to the backend that it was given.
"""

from __future__ import annotations

import torch

from atom_cluster.ops.aiter.binding import AiterFunction
from atom_cluster.ops.moe import RouteTokens, RoutingRule

SOFTMAX = AiterFunction(
    "aiter.ops.moe_op",
    "topk_softmax",
    "topk_weights",
    "topk_indices",
    "token_expert_indices",
    "gating_output",
    "need_renorm",
)
BIASED_GROUPS = AiterFunction(
    "aiter.ops.topk",
    "biased_grouped_topk",
    "gating_output",
    "correction_bias",
    "topk_weights",
    "topk_ids",
    "num_expert_group",
    "topk_group",
    "need_renorm",
    "routed_scaling_factor",
)
FUNCTIONS = (SOFTMAX, BIASED_GROUPS)

GROUP_COUNTS = (1, 2, 4, 8)
"""Numbers of groups that the kernel was built for."""
NEGLIGIBLE_EPS = 1e-12
"""AITER divides by the sum of the weights alone: what is added to it must not matter."""


def route_op(fallback: RouteTokens) -> RouteTokens:
    """Routing by the rules that AITER knows; by others, or with experts chosen already, it is left to `fallback`."""

    def route(
        logits_TE: torch.Tensor,
        bias_E: torch.Tensor | None,
        rule: RoutingRule,
        *,
        expert_TK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_known = expert_TK is None and logits_TE.dtype == torch.float32 and logits_TE.numel() > 0
        if not is_known or not (_is_softmax(rule, bias_E) or _is_biased_sigmoid(rule, bias_E)):
            return fallback(logits_TE, bias_E, rule, expert_TK=expert_TK)
        shape = (len(logits_TE), rule.experts_per_token)
        weight_TK = torch.empty(shape, dtype=torch.float32, device=logits_TE.device)
        chosen_TK = torch.empty(shape, dtype=torch.int32, device=logits_TE.device)
        if bias_E is None:
            SOFTMAX(
                topk_weights=weight_TK,
                topk_indices=chosen_TK,
                token_expert_indices=torch.empty_like(chosen_TK),
                gating_output=logits_TE.contiguous(),
                need_renorm=rule.renormalize,
            )
            if rule.scale != 1.0:
                weight_TK *= rule.scale
        else:
            BIASED_GROUPS(
                gating_output=logits_TE.contiguous(),
                correction_bias=bias_E,
                topk_weights=weight_TK,
                topk_ids=chosen_TK,
                num_expert_group=rule.num_groups,
                topk_group=rule.topk_groups,
                need_renorm=True,
                routed_scaling_factor=rule.scale,
            )
        return chosen_TK.long(), weight_TK

    return route


def _is_softmax(rule: RoutingRule, bias_E: torch.Tensor | None) -> bool:
    if bias_E is not None or rule.num_groups != 1:
        return False
    return rule.score == "softmax" and (not rule.renormalize or rule.renorm_eps <= NEGLIGIBLE_EPS)


def _is_biased_sigmoid(rule: RoutingRule, bias_E: torch.Tensor | None) -> bool:
    has_known_groups = rule.num_groups in GROUP_COUNTS and (rule.num_groups == 1 or rule.group_score == "top2_sum")
    is_renormalized = rule.renormalize and rule.renorm_eps <= NEGLIGIBLE_EPS
    return bias_E is not None and rule.score == "sigmoid" and has_known_groups and is_renormalized
