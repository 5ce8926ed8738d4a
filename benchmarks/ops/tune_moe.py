"""Times ways to cut products of experts on this GPU, and prints the fastest as JSON: python -m benchmarks.ops.tune_moe

Lines of the result go into `atom_cluster/ops/triton/tuning/moe.<arch>.json`. Takes minutes a
kind, most of which is compiling.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from atom_cluster.ops.triton import routing
from atom_cluster.ops.triton.moe import TritonExperts
from atom_cluster.ops.triton.moe_gemm import GemmConfig, multiply_pairs
from atom_cluster.ops.triton.moe_gemv import GemvConfig, down_of_tokens, gate_up_of_pairs
from atom_cluster.ops.triton.moe_sort import sort_pairs, unsorted_pairs
from benchmarks.ops.moe import MODELS, Model, prepare
from benchmarks.ops.timing import time_us

MODEL_OF_KIND = {"float": "qwen", "codes": "deepseek", "packed": "gpt_oss"}
PAIRS_PER_EXPERT = {1: 0, 16: 4, 32: 16, 64: 32, 128: 400}
"""By rows of a tile."""
GEMVS = [
    GemvConfig(outputs, inputs, warps) for outputs in (4, 8, 16) for inputs, warps in ((256, 2), (512, 4), (1024, 4))
]


def candidates(rows: int, kind: str) -> list[GemmConfig]:
    """Tiles that may suit so many rows."""
    if rows == 1:
        cuts = [(64, 128, 4, 4), (128, 128, 8, 4), (32, 128, 2, 4), (64, 128, 4, 3), (32, 256, 2, 3), (16, 256, 1, 4)]
        return [GemmConfig(out, inputs, 1, warps, stages) for out, inputs, warps, stages in cuts]
    if rows <= 32:
        cuts = [(64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3), (128, 128, 8, 4)]
        return [GemmConfig(out, inputs, 1, warps, stages) for out, inputs, warps, stages in cuts]
    together = 2 if rows == 64 else 8
    cuts = [(128, 64, 8, 3), (256, 64, 8, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 128, 8, 3)]
    found = [GemmConfig(out, inputs, together, warps, stages) for out, inputs, warps, stages in cuts]
    if kind == "codes":
        cuts = [(128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 8, 4)]
        found += [
            GemmConfig(out, inputs, together, warps, stages, tokens_first=True) for out, inputs, warps, stages in cuts
        ]
    return found


def tune(kind: str) -> dict[str, dict[str, list[object]]]:
    """The fastest for each product and number of rows; what was measured goes to the standard output."""
    model = MODELS[MODEL_OF_KIND[kind]]
    op, _ = prepare(model)
    assert isinstance(op, TritonExperts), op.name
    best: dict[str, dict[str, list[object]]] = {}
    if kind == "float":
        best["gemv"] = _tune_gemv(model, op)
    for rows, per_expert in PAIRS_PER_EXPERT.items():
        num_tokens = max(1, per_expert * model.num_experts // model.rule.experts_per_token)
        inputs = [_inputs(model, num_tokens) for _ in range(8 if num_tokens < 256 else 2)]
        h = torch.randn(num_tokens * model.rule.experts_per_token, model.expert_size, device="cuda").bfloat16()
        y = torch.empty(len(h), model.size, device="cuda", dtype=torch.bfloat16)
        for part, factor, out in (("gated", op._gate_up, h), ("down", op._down, y)):
            is_gated = part == "gated"
            times: dict[GemmConfig, float] = {}
            for config in candidates(rows, kind):
                calls = []
                for x, expert, _ in inputs:
                    tiles = unsorted_pairs(expert)
                    if rows > 1:
                        tiles = sort_pairs(expert, model.num_experts, rows, config.tiles_together)
                    multiply = partial(
                        multiply_pairs,
                        factor.inputs(x if is_gated else h),
                        factor.matrix,
                        tiles,
                        config,
                        activation=model.activation if is_gated else None,
                        num_chosen=model.rule.experts_per_token,
                        out=out,
                    )
                    calls.append(multiply)
                try:
                    times[config] = time_us(calls)
                except OutOfResources:
                    continue
                print(f"{kind} {part} {rows}: {times[config]:8.1f} us {config}", flush=True)
            fastest = min(times, key=lambda config: times[config])
            best.setdefault(f"{kind} {part}", {})[str(rows)] = [
                fastest.block_out,
                fastest.block_in,
                fastest.tiles_together,
                fastest.num_warps,
                fastest.num_stages,
                fastest.tokens_first,
            ]
    return best


def _tune_gemv(model: Model, op: TritonExperts) -> dict[str, list[object]]:
    inputs = [_inputs(model, 1) for _ in range(16)]
    gate_up, down = op._gate_up.matrix, op._down.matrix
    h = torch.randn(model.rule.experts_per_token, model.expert_size, device="cuda").bfloat16()
    best: dict[str, list[object]] = {}
    for part in ("gated", "down"):
        times: dict[GemvConfig, float] = {}
        for config in GEMVS:
            if part == "gated":
                calls = [
                    lambda x=x, expert=expert, config=config: gate_up_of_pairs(
                        x, gate_up, model.activation, expert, config
                    )
                    for x, expert, _ in inputs
                ]
            else:
                calls = [
                    lambda expert=expert, weight=weight, config=config: down_of_tokens(
                        h, down, expert, weight, None, config
                    )
                    for _, expert, weight in inputs
                ]
            times[config] = time_us(calls)
            print(f"gemv {part}: {times[config]:8.1f} us {config}", flush=True)
        fastest = min(times, key=lambda config: times[config])
        best[part] = [fastest.block_out, fastest.block_in, fastest.num_warps]
    return best


def _inputs(model: Model, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.randn(num_tokens, model.num_experts, device="cuda")
    x = torch.randn(num_tokens, model.size, device="cuda", dtype=torch.bfloat16)
    return x, *routing.route(logits, None, model.rule)


def main() -> None:
    """Kinds that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(MODEL_OF_KIND), choices=list(MODEL_OF_KIND))
    with torch.inference_mode():
        for kind in parser.parse_args().kinds:
            print(json.dumps(tune(kind)), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
