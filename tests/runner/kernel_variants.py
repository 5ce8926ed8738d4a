"""Which variants of kernels steps ask for on a chip that need not be there: python -m tests.runner.kernel_variants

Runs in a process of its own, without the interpreter. The runner computes on the CPU, where no kernel runs: for each
launch, what Triton would look up in its cache is noted. First comes the rehearsal, then the steps before the first
request, then random ones. Prints one line of JSON: how many variants there were, the kernels' names, and by kernel what
only the random steps asked for, and what only steps behind the rehearsal did.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from atom_cluster.config.compilation import CompilationConfig
from atom_cluster.config.quantization import QuantizationConfig
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.ops import select
from atom_cluster.ops import triton as kernels
from atom_cluster.ops.step_inputs import PlacedTokens
from atom_cluster.ops.torch_ref import step_inputs as torch_ref
from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.attention import MAX_SPLIT_QUERIES
from atom_cluster.ops.triton.compile_ahead import variant_of, zeroed_memory
from atom_cluster.runner import warm_up
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.kv_sizing import other_groups
from atom_cluster.runner.model_runner import ModelRunner
from atom_cluster.runner.options import RunnerOptions
from atom_cluster.runner.rehearsal import rehearsal_pages, rehearse
from tests.ops.triton.compile_kernels import CHIPS, AbsentDriver

MULTIPROCESSORS = 132
GREEDY = SamplingParams(seed=0, temperature=0.0)


class Launches:
    """What was looked up, by kernel."""

    def __init__(self) -> None:
        self.keys: dict[str, dict[str, str]] = defaultdict(dict)
        self.compiled: dict[str, set[str]] = defaultdict(set)
        """What was to be compiled and not run."""

    def note(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        """In place of `JITFunction.run`."""
        key, bound, specialization = variant_of(kernel, *args, **options)
        told = {name: special for name, (_, special) in zip(bound, specialization)}
        sizes = {name: value for name, value in bound.items() if isinstance(value, (int, bool)) and name.isupper()}
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        if warmup:
            self.compiled[name].add(key)
            triton.knobs.compilation.listener(cache_hit=False)
        else:
            self.keys[name].setdefault(key, f"{ {k: v for k, v in told.items() if v is not None} } {sizes}")

    @property
    def count(self) -> int:
        return sum(map(len, self.keys.values()))

    def without(self, known: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
        """What was looked up and is not among these, by kernel."""
        found = {
            name: [told for key, told in keys.items() if key not in known.get(name, ())]
            for name, keys in self.keys.items()
        }
        return {name: told for name, told in found.items() if told}


def patches(launches: Launches) -> Iterator[Any]:
    """A chip that is not there, whose kernels leave zeros: indices must be some."""

    def run(kernel: JITFunction, *args: Any, **options: Any) -> None:
        launches.note(kernel, *args, **options)

    def scaled_mm(a: torch.Tensor, b: torch.Tensor, *_: Any, out_dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype)

    def place_tokens(*args: Any) -> PlacedTokens:
        place(*args)
        return torch_ref.place_tokens(*args)

    place = kernels.place_tokens
    yield mock.patch.object(JITFunction, "run", run)
    # On CPUs launches follow from these numbers.
    yield mock.patch.object(kernels, "place_tokens", place_tokens)
    yield mock.patch.object(select, "_is_interpreted", lambda: True)
    yield mock.patch.object(runtime, "num_multiprocessors", lambda device: MULTIPROCESSORS)
    yield mock.patch.object(torch, "_scaled_mm", scaled_mm)  # has not all that GPUs have
    yield zeroed_memory()


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


@dataclass
class Found:
    """What was looked up; of that by kernel what only random steps asked for, and what was not rehearsed."""

    launches: Launches
    late: dict[str, list[str]]
    not_rehearsed: dict[str, list[str]]


def find(options: RunnerOptions, *, chip: str, num_steps: int, seed: int) -> Found:
    triton.runtime.driver.set_active(AbsentDriver(CHIPS[chip]))
    launches, rng = Launches(), random.Random(seed)
    with ExitStack() as stack:
        for patch in patches(launches):
            stack.enter_context(patch)
        runner = build_model_runner(options)
        _rehearse(runner, options)
        layout, budget = runner._program._model.kv_layout, options.max_num_batched_tokens
        for plan in warm_up.warm_up_plans(layout, runner.info, max_num_batched_tokens=budget, decodes=True):
            runner.run(plan)
        not_rehearsed = launches.without(launches.compiled)
        before = {name: set(keys) for name, keys in launches.keys.items()}
        samplings = [GREEDY, GREEDY, *warm_up._SAMPLINGS]
        steps = ((random_parts(rng, runner, budget), rng.choice(samplings)) for _ in range(num_steps))
        for plan in warm_up._plans((step for step in steps if step[0]), layout, runner.info):
            runner.run(plan)
        runner.close()
    return Found(launches, launches.without(before), not_rehearsed)


def _rehearse(runner: ModelRunner, options: RunnerOptions) -> None:
    model = runner._program._model
    pages = rehearsal_pages(model.kv_layout, options.num_drafts)
    groups = other_groups(model.kv_layout, pages)
    info = replace(runner.info, num_blocks=pages[0], other_groups=groups)
    budget = options.max_num_batched_tokens
    rehearse(model, runner._groups, runner._ops, info, max_num_batched_tokens=budget, device=runner.device)


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
    found = find(options, chip=args.chip, num_steps=args.steps, seed=args.seed)
    names = sorted(found.launches.keys)
    told = {"variants": found.launches.count, "kernels": len(names), "names": names}
    print(json.dumps(told | {"late": found.late, "not_rehearsed": found.not_rehearsed}))


if __name__ == "__main__":
    main()
