"""How much of a GPU's matrix rate the computation of prompts reaches, attention included.

    python -m benchmarks.prefill_rate --model shape:llama_8b --workload 16x8192x1

Operations are two per weight of a token's matrices (the output head counts once per prompt) and, per layer, head and
pair of positions that see each other, four per head dim. The rate to compare with is that of an 8192 x 8192 x 8192
bfloat16 product, measured in the same run before and after. Dense models only.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from atom_cluster import LLMEngine
from benchmarks.offline_throughput import Workload, add_engine_arguments, open_engine, our_generate, timed
from benchmarks.records import save_record
from benchmarks.shapes import model_dir

_SIZE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One workload."""

    workload: Workload
    seconds: float
    """The best of the repeats."""
    tflops_per_s: float
    matmul_tflops_per_s: float
    """The mean of before and after."""
    share: float

    def __str__(self) -> str:
        w = self.workload
        return (
            f"{w.num_requests} x {w.input_len}   {self.seconds:.3f} s   {self.tflops_per_s:.0f} TFLOP/s, "
            f"{self.share:.1%} of {self.matmul_tflops_per_s:.0f}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and save if asked to."""
    args = parse_arguments(arguments)
    directory = model_dir(args.model)
    config = json.loads((directory / "config.json").read_text())
    before = matmul_rate()
    with open_engine(directory, args) as engine:
        rows = [measure(engine, workload, config, args.repeats, before) for workload in args.workload]
        choices = dict(engine.info.choices)
    for row in rows:
        print(row, flush=True)
    if args.save:
        details = {"choices": choices, "rows": [asdict(row) for row in rows]}
        print(f"saved {save_record('prefill_rate', Path(directory).name, details)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Workload.parse, nargs="+", default=[Workload(16, 8192, 1)])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    add_engine_arguments(parser)
    return parser.parse_args(arguments)


def measure(engine: LLMEngine, workload: Workload, config: dict[str, Any], repeats: int, before: float) -> Row:
    """Prompts of random tokens, with as few output tokens as there can be."""
    generator, generate = torch.Generator().manual_seed(0), our_generate(engine)
    seconds = []
    for _ in range(1 + repeats):
        shape = (workload.num_requests, workload.input_len)
        prompts = torch.randint(engine.info.vocab_size, shape, generator=generator).tolist()
        seconds.append(timed(generate, prompts, workload.output_len)[0])
    best = min(seconds[1:])
    rate = statistics.mean([before, matmul_rate()])
    achieved = operations(config, workload) / best / 1e12
    return Row(
        workload=workload,
        seconds=best,
        tflops_per_s=achieved,
        matmul_tflops_per_s=rate,
        share=achieved / rate,
    )


def operations(config: dict[str, Any], workload: Workload) -> float:
    """Of the prompts of a workload."""
    hidden, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_dim = config.get("head_dim") or hidden // heads
    per_layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
    length = workload.input_len
    pairs = length * (length + 1) // 2
    per_prompt = config["num_hidden_layers"] * (2 * per_layer * length + 4 * heads * head_dim * pairs)
    return float(workload.num_requests * (per_prompt + 2 * hidden * config["vocab_size"]))


def matmul_rate(num_products: int = 30) -> float:
    """TFLOP/s of torch's product of random bfloat16 matrices."""
    a, b = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(num_products):
        a @ b
    end.record()
    end.synchronize()
    return num_products * 2 * _SIZE**3 / (begin.elapsed_time(end) / 1e3) / 1e12


if __name__ == "__main__":
    main()
