"""Routing of tokens to experts as one launch, a token per program. Knows no experts.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.ops.moe import RoutingRule
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    rule: RoutingRule,
    *,
    expert_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.moe.RouteTokens`. Logits are float32."""
    num_tokens, num_experts = logits_TE.shape
    num_chosen = rule.experts_per_token if expert_TK is None else expert_TK.shape[1]
    is_given = expert_TK is not None
    weight_TK = logits_TE.new_empty(num_tokens, num_chosen)
    if expert_TK is None:
        expert_TK = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=logits_TE.device)
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits_TE,
            logits_TE if bias_E is None else bias_E,
            expert_TK,
            weight_TK,
            num_experts,
            logits_TE.stride(0),
            rule.renorm_eps,
            rule.scale,
            rule.score,
            num_chosen,
            triton.next_power_of_2(num_chosen),
            triton.next_power_of_2(num_experts),
            rule.num_groups,
            triton.next_power_of_2(rule.num_groups),
            rule.topk_groups,
            IS_TOP2=rule.group_score == "top2_sum",
            RENORMALIZE=rule.renormalize,
            HAS_BIAS=bias_E is not None,
            IS_GIVEN=is_given,
            num_warps=1,
            **launch_options(),
        )
    return expert_TK, weight_TK


@triton.jit
def _score(x, is_inside, SCORE: tl.constexpr):
    if SCORE == "softmax":
        power = tl.exp(x - tl.max(x, 0))
        score = power / tl.sum(power, 0)
    elif SCORE == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-x))
    elif SCORE == "sqrt_softplus":
        # As torch has it, and without what the addition loses of a small exponential.
        power = tl.exp(tl.minimum(x, 20.0))
        small = power * (1.0 - 0.5 * power)
        score = tl.sqrt(tl.where(x > 20.0, x, tl.where(power < 1e-3, small, tl.log(1.0 + power))))
    else:
        score = x
    return tl.where(is_inside, score, 0.0)


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    expert_ptr,
    weight_ptr,
    num_experts,
    stride_token,
    renorm_eps,
    scale,
    SCORE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    IS_TOP2: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_start(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK_E)
    choice = tl.arange(0, BLOCK_K)
    is_inside = index < num_experts
    x = tl.load(logits_ptr + token * stride_token + index, is_inside, other=float("-inf"))
    score = _score(x, is_inside, SCORE)
    rank = score
    if HAS_BIAS:
        rank += tl.load(bias_ptr + index, is_inside, other=0.0)
    rank = tl.where(is_inside, rank, float("-inf"))
    if NUM_GROUPS > 1:
        group = index // (num_experts // NUM_GROUPS)
        groups = tl.arange(0, BLOCK_G)
        quality = tl.full([BLOCK_G], float("-inf"), tl.float32)
        for number in tl.static_range(NUM_GROUPS):
            of_group = tl.where(group == number, rank, float("-inf"))
            best = tl.max(of_group, 0)
            if IS_TOP2:
                place = tl.argmax(of_group, 0)
                best += tl.max(tl.where(index == place, float("-inf"), of_group), 0)
            quality = tl.where(groups == number, best, quality)
        is_allowed = tl.zeros([BLOCK_E], tl.int1)
        for _ in tl.static_range(TOPK_GROUPS):
            place = tl.argmax(quality, 0)
            is_allowed = is_allowed | (group == place)
            quality = tl.where(groups == place, float("-inf"), quality)
        rank = tl.where(is_allowed, rank, float("-inf"))
    chosen = tl.zeros([BLOCK_K], tl.int32)
    weight = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for number in tl.static_range(K):
        if IS_GIVEN:
            place = tl.load(expert_ptr + token * K + number).to(tl.int32)
        else:
            # Logits that are no numbers may win behind the last expert, and there is no such expert to read.
            place = tl.minimum(tl.argmax(rank, 0), num_experts - 1)
            rank = tl.where(index == place, float("-inf"), rank)
        chosen = tl.where(choice == number, place, chosen)
        weight = tl.where(choice == number, tl.sum(tl.where(index == place, score, 0.0), 0), weight)
    if SCORE == "softmax_of_chosen":
        weight = tl.exp(weight - tl.max(weight, 0))
        weight = weight / tl.sum(weight, 0)
    weight = tl.where(choice < K, weight, 0.0)
    if RENORMALIZE:
        weight = weight / (tl.sum(weight, 0) + renorm_eps)
    if not IS_GIVEN:
        tl.store(expert_ptr + token * K + choice, chosen.to(tl.int64), choice < K)
    tl.store(weight_ptr + token * K + choice, weight * scale, choice < K)
