"""On a GPU: experts of every format, and routing, are the reference's, whatever sizes; nothing waits for the device."""

from __future__ import annotations

import random

import pytest
import torch

from atom_cluster.ops import torch_ref
from atom_cluster.ops.moe import ExpertActivation, RoutingRule
from atom_cluster.ops.triton import moe, moe_config, routing, runtime
from tests.ops.triton.moe_cases import FORMATS, Case, error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

OAI = ExpertActivation(kind="swiglu_oai", limit=1.0)
LIMITED = ExpertActivation(limit=1.0)
CASES = {
    "one": Case(num_experts=5, size=256, expert_size=128, num_tokens=1, num_chosen=3, has_bias=True),
    "few": Case(num_experts=8, size=416, expert_size=160, num_tokens=3, num_chosen=4, activation=OAI, has_addend=True),
    "decode": Case(num_experts=8, size=512, expert_size=384, num_tokens=40, num_chosen=4, activation=LIMITED),
    "some": Case(num_experts=16, size=512, expert_size=384, num_tokens=300, num_chosen=4, has_bias=True),
    "many": Case(num_experts=6, size=672, expert_size=224, num_tokens=1500, num_chosen=2, has_addend=True),
    "two rows, one expert": Case(num_experts=1, size=256, expert_size=256, num_tokens=2, num_chosen=1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [None, *FORMATS])
def test_experts(name: str | None, case: str) -> None:
    # Where inputs are rounded, activated rows that are bfloat16 before may be rounded to the next number.
    is_rounded = name is not None and FORMATS[name](1, 32, 32).inputs is not None
    assert error(CASES[case], name, dtype=torch.bfloat16, device="cuda") < (6e-2 if is_rounded else 8e-3)


@pytest.mark.parametrize("case", ["one", "decode", "many"])
@pytest.mark.parametrize("name", [None, "float8 blocks", "mxfp4", "int4 with zero points"])
def test_experts_in_float32(name: str | None, case: str) -> None:
    assert error(CASES[case], name, dtype=torch.float32, device="cuda") < 5e-3 if name == "float8 blocks" else 2e-6


@pytest.mark.skipif(not runtime.is_hopper(), reason="for sm_90")
@pytest.mark.parametrize("seed", range(12))
def test_both_kernels_agree(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    num_experts = chance.choice([1, 2, 5, 40])
    case = Case(
        num_experts=num_experts,
        size=128 * chance.randint(2, 9),
        expert_size=128 * chance.randint(2, 5),
        num_tokens=chance.choice([1, 3, 17, 65, 130, 700, 3000]),
        num_chosen=chance.randint(1, min(num_experts, 6)),
        activation=chance.choice([ExpertActivation(), OAI, LIMITED]),
        has_addend=chance.random() < 0.5,
    )
    errors = []
    for is_for_hopper in (True, False):
        monkeypatch.setattr(moe_config, "is_unsorted", lambda *_: False)
        monkeypatch.setattr(moe_config, "is_for_hopper", lambda _, chosen=is_for_hopper: chosen)
        errors.append(error(case, "float8 blocks", dtype=torch.bfloat16, device="cuda", seed=seed))
    assert errors[0] < 6e-2
    assert abs(errors[0] - errors[1]) < 1e-3


def test_a_replayed_graph_follows_the_choices() -> None:
    torch.manual_seed(0)
    stacks = torch.randn(8, 512, 256, device="cuda") / 16, torch.randn(8, 256, 256, device="cuda") / 16
    ops = [
        prepare(*stacks, gate_up_bias=None, down_bias=None, activation=ExpertActivation(), dtype=torch.bfloat16)
        for prepare in (moe.prepare_experts, torch_ref.prepare_experts)
    ]
    x = torch.randn(24, 256, device="cuda", dtype=torch.bfloat16)
    choices, share = torch.zeros(24, 4, dtype=torch.int64, device="cuda"), torch.rand(24, 4, device="cuda")
    with torch.inference_mode():
        ops[0](x, choices, share)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops[0](x, choices, share)
        for _ in range(3):
            choices.copy_(torch.rand(24, 9, device="cuda").topk(4).indices)
            graph.replay()
            expected = ops[1](x, choices, share)
            assert (y - expected).float().norm() < 1e-2 * expected.float().norm()


def test_nothing_waits_for_the_device() -> None:
    stacks = torch.randn(8, 512, 256, device="cuda"), torch.randn(8, 256, 256, device="cuda")
    op = moe.prepare_experts(
        *stacks, gate_up_bias=None, down_bias=None, activation=ExpertActivation(), dtype=torch.bfloat16
    )
    rule = RoutingRule(experts_per_token=4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for num_tokens in (1, 30, 2000):
            x = torch.zeros(num_tokens, 256, device="cuda", dtype=torch.bfloat16)
            op(x, *routing.route(torch.zeros(num_tokens, 8, device="cuda"), None, rule))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_tokens", [1, 33, 5000])
@pytest.mark.parametrize(
    ("num_experts", "rule"),
    [
        (128, RoutingRule(experts_per_token=8, renormalize=True)),
        (60, RoutingRule(experts_per_token=4)),
        (512, RoutingRule(experts_per_token=10, renormalize=True)),
        (128, RoutingRule(experts_per_token=4, score="softmax_of_chosen")),
        (
            256,
            RoutingRule(experts_per_token=8, score="sigmoid", num_groups=8, topk_groups=4, renormalize=True, scale=2.5),
        ),
        (384, RoutingRule(experts_per_token=6, score="sqrt_softplus", renormalize=True, renorm_eps=1e-20)),
        (160, RoutingRule(experts_per_token=6, num_groups=8, topk_groups=3, group_score="max", scale=16.0)),
    ],
)
def test_routing(num_experts: int, rule: RoutingRule, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    logits = torch.randn(num_tokens, num_experts, device="cuda")
    bias = torch.randn(num_experts, device="cuda") * 0.1 if rule.score != "softmax" else None
    found, expected = (route(logits, bias, rule) for route in (routing.route, torch_ref.route))
    # Two that score the same may come in any order.
    orders = [experts.sort() for experts, _ in (found, expected)]
    same = (orders[0].values == orders[1].values).all(1)
    assert same.float().mean() > 0.999
    weights = [w.gather(1, order.indices)[same] for (_, w), order in zip((found, expected), orders)]
    torch.testing.assert_close(weights[0], weights[1], rtol=2e-5, atol=1e-7)
    given = routing.route(logits, None, rule, expert_TK=expected[0])
    torch.testing.assert_close(
        given[1], torch_ref.route(logits, None, rule, expert_TK=expected[0])[1], rtol=2e-5, atol=1e-7
    )
