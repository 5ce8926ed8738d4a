"""Every backend chooses and applies experts as the contract says; here token by token, in float64."""

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.ops.moe import ExpertActivation, RoutingRule
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.table import OpTable
from atom_cluster.platform.detect import detect_platform

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
CASES = [(backend, dtype) for backend in ("torch", "cpu") for dtype in TOLERANCE] + [("triton", torch.float32)]
NUM_EXPERTS, SIZE, EXPERT_SIZE = 6, 20, 12
ACTIVATIONS = [
    ExpertActivation(),
    ExpertActivation(limit=0.3),
    ExpertActivation(kind="swiglu_oai", limit=0.5, alpha=1.3),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def case(request: pytest.FixtureRequest) -> tuple[OpTable, torch.dtype]:
    backend, dtype = request.param
    return select_ops(OpsConfig(backend=backend), detect_platform("cpu"), dtype), dtype


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_expert(x: torch.Tensor, weights: list[torch.Tensor], activation: ExpertActivation) -> torch.Tensor:
    gate_up, down, gate_up_bias, down_bias = weights
    gate, up = (gate_up @ x + gate_up_bias).chunk(2)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    if activation.kind == "silu":
        return down @ (gate * torch.sigmoid(gate) * up) + down_bias
    return down @ (gate * torch.sigmoid(gate * activation.alpha) * (up + 1)) + down_bias


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["silu", "silu-limit", "oai-limit"])
def test_experts(case: tuple[OpTable, torch.dtype], activation: ExpertActivation, stored: torch.dtype) -> None:
    ops, dtype = case
    gate_up = (randn(NUM_EXPERTS, 2 * EXPERT_SIZE, SIZE, seed=0) * 0.3).to(stored)
    down = (randn(NUM_EXPERTS, SIZE, EXPERT_SIZE, seed=1) * 0.3).to(stored)
    biases = [randn(NUM_EXPERTS, size, seed=size).to(dtype) for size in (2 * EXPERT_SIZE, SIZE)]
    experts = ops.prepare_experts(
        gate_up, down, gate_up_bias=biases[0], down_bias=biases[1], activation=activation, dtype=dtype
    )
    # The last expert is used by nobody, and NUM_EXPERTS stands for one on another rank.
    expert_ids = torch.tensor([[0, 3, 1], [4, NUM_EXPERTS, 0], [NUM_EXPERTS] * 3, [2, 0, NUM_EXPERTS], [3, 2, 4]])
    choice_weights, x = torch.rand(5, 3), randn(5, SIZE, seed=2).to(dtype)
    before = x.clone()
    y = experts(x, expert_ids, choice_weights)
    expected = torch.zeros(5, SIZE, dtype=torch.float64)
    for token, choices in enumerate(expert_ids.tolist()):
        for expert, weight in zip(choices, choice_weights[token].double()):
            if expert < NUM_EXPERTS:
                weights = [stack[expert].to(dtype).double() for stack in (gate_up, down, *biases)]
                expected[token] += weight * one_expert(x[token].double(), weights, activation)
    assert y.dtype == dtype
    assert torch.equal(x, before)
    torch.testing.assert_close(y.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    addend = randn(1, SIZE, seed=3).to(dtype)
    y = experts(x[:1], expert_ids[:1], choice_weights[:1], addend_TD=addend)
    expected = expected[:1] + addend.double()
    torch.testing.assert_close(y.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


RULES = [
    RoutingRule(experts_per_token=3),
    RoutingRule(experts_per_token=3, renormalize=True),
    RoutingRule(experts_per_token=2, score="softmax_of_chosen"),
    RoutingRule(experts_per_token=4, score="sigmoid", renormalize=True, renorm_eps=0.5, scale=2.5),
    RoutingRule(experts_per_token=3, score="sigmoid", num_groups=4, topk_groups=2, renormalize=True),
    RoutingRule(experts_per_token=3, num_groups=4, topk_groups=2, group_score="max", scale=16.0),
    RoutingRule(experts_per_token=2, score="sqrt_softplus", renormalize=True),
]


def route_one(logits: list[float], bias: list[float], rule: RoutingRule) -> dict[int, float]:
    """{expert: weight} of one token."""
    x = torch.tensor(logits, dtype=torch.float64)
    scores = {
        "softmax": x.softmax(0),
        "softmax_of_chosen": x,
        "sigmoid": 1 / (1 + torch.exp(-x)),
        "sqrt_softplus": torch.log(1 + torch.exp(x)).sqrt(),
    }[rule.score].tolist()
    rank = [score + extra for score, extra in zip(scores, bias)]
    size = len(rank) // rule.num_groups
    groups = [range(start, start + size) for start in range(0, len(rank), size)]

    def quality(group: range) -> float:
        best = sorted((rank[expert] for expert in group), reverse=True)
        return best[0] if rule.group_score == "max" else sum(best[:2])

    allowed = [expert for group in sorted(groups, key=quality)[-rule.topk_groups :] for expert in group]
    chosen = sorted(allowed, key=lambda expert: rank[expert])[-rule.experts_per_token :]
    weights = {expert: scores[expert] for expert in chosen}
    if rule.score == "softmax_of_chosen":
        weights = dict(zip(chosen, x[chosen].softmax(0).tolist()))
    total = sum(weights.values()) + rule.renorm_eps if rule.renormalize else 1.0
    return {expert: weight / total * rule.scale for expert, weight in weights.items()}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.score}-{rule.num_groups}-{rule.renormalize}")
def test_routing(case: tuple[OpTable, torch.dtype], rule: RoutingRule, has_bias: bool) -> None:
    ops, dtype = case
    dtype = torch.promote_types(dtype, torch.float32)
    logits, expert_bias = randn(30, 8, seed=3).to(dtype), (randn(8, seed=4) * 0.4).to(dtype)
    expert_ids, choice_weights = ops.route(logits, expert_bias if has_bias else None, rule)
    assert expert_ids.dtype == torch.int64
    assert choice_weights.dtype == dtype
    bias = expert_bias.tolist() if has_bias else [0.0] * 8
    for experts, weights, row in zip(expert_ids.tolist(), choice_weights.tolist(), logits.tolist()):
        assert dict(zip(experts, weights)) == pytest.approx(route_one(row, bias, rule), rel=1e-5)
    again_ids, again_weights = ops.route(logits, None, rule, expert_TK=expert_ids)
    assert torch.equal(again_ids, expert_ids)
    torch.testing.assert_close(again_weights, choice_weights, rtol=1e-5, atol=1e-6)
