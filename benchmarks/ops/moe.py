"""Speed of a mixture of experts on a GPU: python -m benchmarks.ops.moe [qwen] [deepseek] [gpt_oss]

Per number of tokens: routing, and experts as a whole, with inputs that follow each other in different experts. Of few
tokens, bytes per second of the weights of all experts that have a token; of many, the rate of the products. Experts are
chosen by random numbers (even), most tokens' are a few (skewed), or all tokens' are the same (same).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from atom_cluster.ops.moe import ExpertActivation, ExpertsOp, RoutingRule
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight
from atom_cluster.ops.triton import moe, routing
from benchmarks.ops.timing import share_of_bandwidth, time_us

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192, 16384)
FEWEST_OF_MANY = 2048
"""Tokens from which on products are what takes time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of one layer's experts, and how their weights are stored."""

    num_experts: int
    size: int
    expert_size: int
    rule: RoutingRule
    make_weight: Callable[[int, int, int], QuantizedWeight] | None = None
    """None: bfloat16."""
    activation: ExpertActivation = ExpertActivation()


def float8_blocks(num_experts: int, num_out: int, num_in: int) -> QuantizedWeight:
    """As DeepSeek-V3 has them."""
    return QuantizedWeight(
        number="float8",
        codes=torch.randint(0, 120, (num_experts, num_out, num_in), device="cuda", dtype=torch.uint8).view(
            torch.float8_e4m3fn
        ),
        scale=torch.rand(num_experts, num_out // 128, num_in // 128, device="cuda") * 1e-3,
        block=(128, 128),
        inputs=InputQuantization(number="float8", group_size=128),
    )


def mxfp4(num_experts: int, num_out: int, num_in: int) -> QuantizedWeight:
    """As gpt-oss has them."""
    return QuantizedWeight(
        number="float4",
        codes=torch.randint(0, 256, (num_experts, num_out, num_in // 2), device="cuda", dtype=torch.uint8),
        scale=torch.full((num_experts, num_out, num_in // 32), 119, device="cuda", dtype=torch.uint8),
        block=(1, 32),
    )


MODELS = {
    "qwen": Model(num_experts=128, size=2048, expert_size=768, rule=RoutingRule(experts_per_token=8, renormalize=True)),
    "deepseek": Model(
        num_experts=256,
        size=7168,
        expert_size=2048,
        rule=RoutingRule(experts_per_token=8, score="sigmoid", num_groups=8, topk_groups=4, renormalize=True),
        make_weight=float8_blocks,
    ),
    "gpt_oss": Model(
        num_experts=128,
        size=2880,
        expert_size=2880,
        rule=RoutingRule(experts_per_token=4, score="softmax_of_chosen"),
        make_weight=mxfp4,
        activation=ExpertActivation(kind="swiglu_oai", limit=7.0),
    ),
}


def prepare(model: Model) -> tuple[ExpertsOp, int]:
    """The experts, and how many bytes one of them has."""
    shapes = (
        (model.num_experts, 2 * model.expert_size, model.size),
        (model.num_experts, model.size, model.expert_size),
    )
    common = {"gate_up_bias": None, "down_bias": None, "activation": model.activation, "dtype": torch.bfloat16}
    if model.make_weight is None:
        stacks = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[2] ** -0.5 for shape in shapes]
        return moe.prepare_experts(*stacks, **common), sum(2 * stack[0].numel() for stack in stacks)
    weights = [model.make_weight(*shape) for shape in shapes]
    num_bytes = sum(
        tensor[0].numel() * tensor.element_size() for weight in weights for tensor in (weight.codes, weight.scale)
    )
    return moe.prepare_quantized_experts(*weights, **common), num_bytes


def choose(logits_TE: torch.Tensor, choice: str) -> torch.Tensor:
    """Logits that lead to such choices."""
    if choice == "same":
        return logits_TE[:1].expand_as(logits_TE).contiguous()
    if choice == "skewed":
        ranks = torch.arange(1, logits_TE.shape[1] + 1, device=logits_TE.device)
        return logits_TE - ranks.log()[torch.randperm(len(ranks), device=ranks.device)]
    return logits_TE


def measure(name: str, choice: str) -> None:
    """One line per number of tokens."""
    model = MODELS[name]
    op, expert_bytes = prepare(model)
    print(f"{name}: {op.name}, {choice}")
    for num_tokens in TOKENS:
        num_inputs = 8 if num_tokens < FEWEST_OF_MANY else 1
        x = [torch.randn(num_tokens, model.size, device="cuda", dtype=torch.bfloat16) for _ in range(num_inputs)]
        logits = [choose(torch.randn(num_tokens, model.num_experts, device="cuda"), choice) for _ in range(num_inputs)]
        routes = [routing.route(one, None, model.rule) for one in logits]
        num_read = sum(expert.unique().numel() for expert, _ in routes) / num_inputs
        route_us = time_us([lambda one=one: routing.route(one, None, model.rule) for one in logits])
        us = time_us([lambda one=one, route=route: op(one, *route) for one, route in zip(x, routes)])
        rate = share_of_bandwidth(num_read * expert_bytes, us)
        if num_tokens >= FEWEST_OF_MANY:
            flops = 6 * num_tokens * model.rule.experts_per_token * model.size * model.expert_size
            rate = f"{flops / us / 1e6:6.0f} TFLOP/s"
        print(f"  {num_tokens:6d} tokens: routing {route_us:6.1f} us, experts {us:8.1f} us, {rate}", flush=True)


def main() -> None:
    """The models that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--choice", nargs="+", default=["even"], choices=["even", "skewed", "same"])
    args = parser.parse_args()
    with torch.inference_mode():
        for name, choice in itertools.product(args.models, args.choice):
            measure(name, choice)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
