"""Reference routing of tokens to experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atom_cluster.ops.moe import RoutingRule


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    rule: RoutingRule,
    *,
    expert_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert_TK, weight_TK)"""
    is_of_chosen = rule.score == "softmax_of_chosen"
    score_TE = logits_TE if is_of_chosen else _score(logits_TE, rule)
    if expert_TK is None:
        expert_TK = _choose(score_TE if bias_E is None else score_TE + bias_E, rule)
    weight_TK = score_TE.gather(1, expert_TK)
    if is_of_chosen:
        weight_TK = weight_TK.softmax(-1)
    if rule.renormalize:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + rule.renorm_eps)
    return expert_TK, weight_TK * rule.scale


def _score(logits_TE: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    if rule.score == "softmax":
        return logits_TE.softmax(-1)
    return logits_TE.sigmoid() if rule.score == "sigmoid" else F.softplus(logits_TE).sqrt()


def _choose(rank_TE: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    """The experts of the highest rank, in groups of the highest rank, [T, K]."""
    if rule.num_groups > 1:
        rank_TGE = rank_TE.view(len(rank_TE), rule.num_groups, rank_TE.shape[1] // rule.num_groups)
        group_TG = rank_TGE.amax(-1) if rule.group_score == "max" else rank_TGE.topk(2, dim=-1).values.sum(-1)
        is_out_TG = torch.ones_like(group_TG, dtype=torch.bool)
        is_out_TG.scatter_(1, group_TG.topk(rule.topk_groups, dim=-1).indices, value=False)
        rank_TE = rank_TGE.masked_fill(is_out_TG[..., None], float("-inf")).flatten(-2)
    return rank_TE.topk(rule.experts_per_token, dim=-1).indices
