"""Which variants of kernels steps ask for on a chip that need not be there: python -m tests.runner.kernel_variants

Runs in a process of its own, without the interpreter. The runner computes on the CPU, where no kernel runs: for each
launch, what Triton would look up in its cache is noted. First come the steps before the first request, then random
ones. Prints one line of JSON: how many variants there were, the kernels' names, and by kernel
what only the random steps asked for.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction, compute_cache_key

from atom_cluster.config.compilation import CompilationConfig
from atom_cluster.config.quantization import QuantizationConfig
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.ops import select
from atom_cluster.ops.step_inputs import PlacedTokens
from atom_cluster.ops.torch_ref import step_inputs as torch_ref
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.attention import MAX_SPLIT_QUERIES
from atom_cluster.runner import warm_up
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.model_runner import ModelRunner
from atom_cluster.runner.options import RunnerOptions
from tests.ops.triton.compile_kernels import CHIPS, AbsentDriver

MULTIPROCESSORS = 132
GREEDY = SamplingParams(seed=0, temperature=0.0)


class Launches:
    """What was looked up, by kernel."""

    def __init__(self) -> None:
        self.keys: dict[str, dict[str, str]] = defaultdict(dict)

    def note(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        """In place of `JITFunction.run`."""
        options |= {"debug": False, "instrumentation_mode": ""}
        device = triton.runtime.driver.active.get_current_device()
        _, key_cache, _, _, binder = kernel.device_caches[device]
        bound, specialization, found = binder(*args, **options)
        key = compute_cache_key(key_cache, specialization, found)
        told = {name: special for name, (_, special) in zip(bound, specialization)}
        sizes = {name: value for name, value in bound.items() if isinstance(value, (int, bool)) and name.isupper()}
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        self.keys[name].setdefault(str(key), f"{ {k: v for k, v in told.items() if v is not None} } {sizes}")

    @property
    def count(self) -> int:
        return sum(map(len, self.keys.values()))


def patches(launches: Launches) -> Iterator[Any]:
    """A chip that is not there, whose kernels leave zeros: indices must be some."""

    def run(kernel: JITFunction, *args: Any, **options: Any) -> None:
        launches.note(kernel, *args, **options)

    def scaled_mm(a: torch.Tensor, b: torch.Tensor, *_: Any, out_dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype)

    yield mock.patch.object(JITFunction, "run", run)
    yield mock.patch.object(select, "_is_interpreted", lambda: True)
    yield mock.patch.object(runtime, "num_multiprocessors", lambda device: MULTIPROCESSORS)
    yield mock.patch.object(torch, "_scaled_mm", scaled_mm)  # has not all that GPUs have
    yield mock.patch.object(torch, "empty", torch.zeros)
    yield mock.patch.object(torch, "empty_like", torch.zeros_like)
    yield mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros)


def random_parts(rng: random.Random, runner: ModelRunner, budget: int) -> list[warm_up._Part]:
    """Rows that decode or verify drafts, then chunks, of any number that a step may have."""
    info = runner.info
    longest = info.max_model_len - 2 - info.max_drafts
    drafts = rng.choice([0, info.max_drafts])
    most = min(info.max_num_requests, budget // (1 + drafts)) - 1
    num_decoding = rng.choice([0, rng.randint(0, min(8, most)), rng.randint(0, most)])
    parts = [warm_up._Part(rng.randint(1, longest - drafts), 1 + drafts, drafts) for _ in range(num_decoding)]
    left = budget - num_decoding * (1 + drafts)
    for _ in range(rng.choice([0, 1, 1, 2, 5, most]) if parts else rng.choice([1, 1, 2, 5, most])):
        num_cached = rng.choice([0, 0, rng.randint(0, longest // 2)])
        wanted = rng.choice([rng.randint(2, 2 + MAX_SPLIT_QUERIES), int(rng.lognormvariate(4.5, 1.5)) + 2])
        num_tokens = min(left, longest - num_cached, wanted)
        if num_tokens < 2 or len(parts) == info.max_num_requests:
            break
        parts.append(warm_up._Part(num_cached, num_tokens))
        left -= num_tokens
    return parts


def find(options: RunnerOptions, *, chip: str, num_steps: int, seed: int) -> tuple[Launches, dict[str, list[str]]]:
    """All that was looked up, and of that by kernel what only random steps asked for."""
    triton.runtime.driver.set_active(AbsentDriver(CHIPS[chip]))
    launches, rng = Launches(), random.Random(seed)
    with ExitStack() as stack:
        for patch in patches(launches):
            stack.enter_context(patch)
        runner = build_model_runner(options)
        place = runner._inputs._place

        def place_tokens(*args: Any) -> PlacedTokens:
            place(*args)
            return torch_ref.place_tokens(*args)

        runner._inputs._place = place_tokens  # numbers of tokens have to be right: launches follow from them
        layout, budget = runner._program._model.kv_layout, options.max_num_batched_tokens
        for plan in warm_up.warm_up_plans(layout, runner.info, max_num_batched_tokens=budget, decodes=True):
            runner.run(plan)
        before = {name: set(keys) for name, keys in launches.keys.items()}
        samplings = [GREEDY, GREEDY, *warm_up._SAMPLINGS]
        steps = ((random_parts(rng, runner, budget), rng.choice(samplings)) for _ in range(num_steps))
        for plan in warm_up._plans((step for step in steps if step[0]), layout, runner.info):
            runner.run(plan)
        runner.close()
    late = {
        name: [told for key, told in keys.items() if key not in before.get(name, ())]
        for name, keys in launches.keys.items()
    }
    return launches, {name: told for name, told in late.items() if told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir")
    parser.add_argument("--chip", default="sm_90", choices=list(CHIPS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--model-len", type=int, default=500)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    has_weights = any(Path(args.model_dir).glob("*.safetensors"))
    options = RunnerOptions(
        model_dir=args.model_dir,
        dtype=args.dtype,
        device="cpu",
        ops_backend="triton",
        num_blocks=args.model_len,
        max_num_requests=args.requests,
        max_model_len=args.model_len,
        max_num_batched_tokens=args.budget,
        num_drafts=args.drafts,
        kv_dtype=args.kv_dtype,
        load_format="safetensors" if has_weights else "dummy",
        compilation=CompilationConfig(graph_mode="none"),
        quantization=QuantizationConfig(online=args.quantize),
    )
    launches, late = find(options, chip=args.chip, num_steps=args.steps, seed=args.seed)
    names = sorted(launches.keys)
    print(json.dumps({"variants": launches.count, "kernels": len(names), "names": names, "late": late}))


if __name__ == "__main__":
    main()
