"""Tokens per second of `LLMEngine` and of a peer, on the same prompts, alternating in one process.

    python -m benchmarks.offline_throughput --model demo:smollm2-135m-instruct --batch 1 8 --threads 1

Both compute in float32, greedily, ignoring end-of-sequence tokens, so both produce exactly `--output-len` tokens per
prompt. The runs alternate, so a busy machine slows both alike: read the ratio, not the absolute numbers. Every repeat
has prompts of its own, and prefix caching is off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.config.model_path import resolve_model_path

RESULTS_DIR = Path(__file__).parent / "results"
Prompts = list[list[int]]
Generate = Callable[[Prompts], list[list[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One batch size. Rates are medians over repeats, output tokens per second including the prompts' computation."""

    batch: int
    ours_tokens_per_s: float
    peer_tokens_per_s: float | None
    ratio: float | None
    """Median over repeats of ours / peer of the same repeat."""
    equal_outputs: float | None
    """Share of outputs that are equal token for token."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and save it if asked to."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    model_dir = resolve_model_path(args.model)
    rows = []
    with LLMEngine(
        model_dir,
        dtype="float32",
        device="cpu",
        num_threads=args.threads,
        max_num_requests=max(args.batch),
        max_model_len=args.input_len + args.output_len,
        ops_backend=args.ops_backend,
        prefix_caching=False,
    ) as engine:
        for name, choice in engine.info.choices.items():
            print(f"{name}: {choice}")
        ours = our_generate(engine, args.output_len)
        peer = transformers_generate(model_dir, args.output_len) if args.peer == "transformers" else None
        for batch in args.batch:
            rows.append(measure(ours, peer, batch=batch, args=args, vocab_size=engine.info.vocab_size))
            print_row(rows[-1])
    if args.save:
        print(f"saved {save(rows, args)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory, hub id or demo:NAME")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", choices=["transformers", "none"], default="transformers")
    parser.add_argument("--input-len", type=int, default=64, help="prompt tokens")
    parser.add_argument("--output-len", type=int, default=64, help="output tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ops-backend", choices=["auto", "torch", "cpu", "triton"], default="auto")
    parser.add_argument("--save", action="store_true", help=f"write JSON to {RESULTS_DIR}")
    return parser.parse_args(arguments)


def our_generate(engine: LLMEngine, output_len: int) -> Generate:
    """Our engine as a function from prompts to outputs."""
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)

    def generate(prompts: Prompts) -> list[list[int]]:
        return [output["token_ids"] for output in engine.generate(prompts, params)]

    return generate


def transformers_generate(model_dir: Path, output_len: int) -> Generate:
    """`transformers` generate with its default settings for CPUs, as a function from prompts to outputs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(prompts: Prompts) -> list[list[int]]:
        input_ids = torch.tensor(prompts)
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=output_len,
            do_sample=False,
            pad_token_id=0,
        )
        return [row[input_ids.shape[1] :].tolist() for row in output]

    return generate


def measure(ours: Generate, peer: Generate | None, *, batch: int, args: argparse.Namespace, vocab_size: int) -> Row:
    """One batch size: a short warm-up of both, then alternating repeats."""
    generator = torch.Generator().manual_seed(batch)

    def prompts() -> Prompts:
        found: Prompts = torch.randint(vocab_size, (batch, args.input_len), generator=generator).tolist()
        return found

    for generate in (ours, peer):
        if generate is not None:
            generate([prompt[:8] for prompt in prompts()])
    our_rates, peer_rates, equal = [], [], []
    for _ in range(args.repeats):
        batch_prompts = prompts()
        rate, our_outputs = timed(ours, batch_prompts)
        our_rates.append(rate)
        if peer is not None:
            rate, peer_outputs = timed(peer, batch_prompts)
            peer_rates.append(rate)
            equal += [a == b for a, b in zip(our_outputs, peer_outputs)]
    return Row(
        batch=batch,
        ours_tokens_per_s=statistics.median(our_rates),
        peer_tokens_per_s=statistics.median(peer_rates) if peer_rates else None,
        ratio=statistics.median(a / b for a, b in zip(our_rates, peer_rates)) if peer_rates else None,
        equal_outputs=sum(equal) / len(equal) if equal else None,
    )


def timed(generate: Generate, prompts: Prompts) -> tuple[float, list[list[int]]]:
    """Output tokens per second, and the outputs."""
    start = time.perf_counter()
    outputs = generate(prompts)
    elapsed_s = time.perf_counter() - start
    return sum(map(len, outputs)) / elapsed_s, outputs


def print_row(row: Row) -> None:
    """One line of the table."""
    line = f"batch {row.batch:3d}   ours {row.ours_tokens_per_s:8.1f} tok/s"
    if row.ratio is not None:
        line += f"   peer {row.peer_tokens_per_s:8.1f} tok/s   ratio {row.ratio:5.2f}"
        line += f"   equal outputs {row.equal_outputs:.0%}"
    print(line, flush=True)


def save(rows: list[Row], args: argparse.Namespace) -> Path:
    """Write the rows and everything needed to repeat them."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    record = {
        "benchmark": "offline_throughput",
        "command": f"{Path(sys.executable).name} -m benchmarks.offline_throughput {' '.join(sys.argv[1:])}",
        "commit": git.stdout.strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": {"cpu": cpu_name(), "num_cpus": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "software": {"python": platform.python_version(), "torch": torch.__version__},
        "model": resolve_model_path(args.model).name,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "threads": args.threads,
        "rows": [asdict(row) for row in rows],
    }
    RESULTS_DIR.mkdir(exist_ok=True)
    path = RESULTS_DIR / f"offline_throughput_{record['model']}_{time.strftime('%Y%m%d_%H%M%S', time.gmtime())}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def cpu_name() -> str:
    """Model name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
