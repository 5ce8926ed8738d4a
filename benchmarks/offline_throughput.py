"""Tokens per second of `LLMEngine` on batches of prompts; if asked for, beside a peer in the same process.

    python -m benchmarks.offline_throughput --model shape:llama_8b --workload 1x128x512 128x1024x256
    python -m benchmarks.offline_throughput --model demo:smollm2-135m-instruct --workload 1x64x64 8x64x64 \\
        --dtype float32 --threads 1 --peer transformers

A workload is requests x prompt tokens x output tokens. `shape:NAME` is a model of dummy weights (benchmarks/shapes.py).
Decoding is greedy and ignores end-of-sequence tokens; every repeat has random prompts of its own, and prefix caching is
off. Seconds are the best of the repeats, from the first request added to the last one finished. With a peer the runs
alternate, so a busy machine slows both alike: read the ratio then, which is a median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.config.compilation import CompilationConfig
from atom_cluster.config.observability import ProfileConfig
from atom_cluster.config.quantization import QuantizationConfig
from atom_cluster.config.speculative import SpeculativeConfig
from atom_cluster.observability.metrics import MetricSink
from benchmarks.records import save_record
from benchmarks.routing import favour_some_experts
from benchmarks.shapes import model_dir

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[list[int]]]
"""(prompts, output tokens of each) -> outputs"""


@dataclass(frozen=True, slots=True)
class Workload:
    """So many requests, all of one size."""

    num_requests: int
    input_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """From 128x1024x256. Raises ValueError."""
        numbers = [int(part) for part in text.split("x")]
        if len(numbers) != 3 or min(numbers) < 1:
            raise ValueError(f"{text!r} is not requests x prompt tokens x output tokens, such as 128x1024x256")
        return cls(*numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one workload took."""

    workload: Workload
    seconds: float
    """The best of the repeats."""
    all_seconds: list[float]
    output_tokens_per_s: float
    all_tokens_per_s: float
    """Prompt tokens included."""
    peer_tokens_per_s: float | None = None
    """Output tokens, median over repeats."""
    ratio: float | None = None
    """Median over repeats of ours / peer of the same repeat."""
    equal_outputs: float | None = None
    """Share of outputs that are equal to the peer's token for token."""

    def __str__(self) -> str:
        w = self.workload
        line = f"{w.num_requests:4d} x {w.input_len:5d} + {w.output_len:4d}   {self.seconds:8.3f} s"
        line += f"   {self.output_tokens_per_s:9.1f} output tok/s   {self.all_tokens_per_s:9.1f} tok/s"
        if self.ratio is not None:
            line += f"   peer {self.peer_tokens_per_s:8.1f}   ratio {self.ratio:5.2f}   equal {self.equal_outputs:.0%}"
        return line


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and save it if asked to."""
    args = parse_arguments(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    directory = model_dir(args.model)
    started_s = time.perf_counter()
    with open_engine(directory, args) as engine:
        start_s = time.perf_counter() - started_s
        for name, choice in engine.info.choices.items():
            print(f"{name}: {choice}")
        print(f"started in {start_s:.1f} s", flush=True)
        peer = transformers_generate(directory) if args.peer == "transformers" else None
        rows = []
        for workload in args.workload:
            rows.append(measure(our_generate(engine), peer, workload, repeats=args.repeats, engine=engine))
            print(rows[-1], flush=True)
        if args.speculative:
            engine.print_mtp_statistics()
        choices = dict(engine.info.choices)
    if args.save:
        details = {"start_s": start_s, "choices": choices, "rows": [asdict(row) for row in rows]}
        print(f"saved {save_record('offline_throughput', args.label or directory.name, details)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workload", type=Workload.parse, nargs="+", default=[Workload(1, 64, 64), Workload(8, 64, 64)]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", choices=["transformers", "none"], default="none")
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    parser.add_argument("--label", help="name of the saved result; the model's if not given")
    add_engine_arguments(parser)
    return parser.parse_args(arguments)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """What `open_engine` uses."""
    parser.add_argument("--model", required=True, help="directory, hub id, demo:NAME or shape:NAME")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--quantize", help="online quantization: fp8, fp8_block, mxfp8, mxfp4, int8 or int4")
    parser.add_argument("--speculative", type=int, default=0, metavar="K", help="draft K tokens")
    parser.add_argument("--graph-mode", choices=["full_and_piecewise", "full", "none"], default="full_and_piecewise")
    parser.add_argument("--capture-sizes", type=int, nargs="+", help="rows of decode steps to capture")
    parser.add_argument("--capture", choices=["start", "lazy"], default="start", help="when graphs are captured")
    parser.add_argument("--ops-backend", choices=["auto", "torch", "cpu", "triton"], default="auto")
    parser.add_argument("--threads", type=int, help="compute threads on CPUs")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-num-requests", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--max-model-len", type=int, help="longest context; the workloads' longest if not given")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that compute together")
    parser.add_argument("--memory-fraction", type=float, default=0.85)
    parser.add_argument(
        "--same-experts", action="store_true", help="all tokens go to the same experts, see benchmarks/routing.py"
    )


def open_engine(
    directory: Path,
    args: argparse.Namespace,
    *,
    metrics: MetricSink | None = None,
    profile: ProfileConfig | None = None,
) -> LLMEngine:
    """An engine as the command line describes it; dummy weights where there are no others."""
    if args.same_experts:
        favour_some_experts()
    longest = max(workload.input_len + workload.output_len for workload in args.workload)
    has_weights = any(directory.glob("*.safetensors")) or any(directory.glob("*.gguf"))
    sizes = None if args.capture_sizes is None else tuple(args.capture_sizes)
    return LLMEngine(
        directory,
        dtype=args.dtype,
        device=args.device,
        block_size=args.block_size,
        memory_fraction=args.memory_fraction,
        max_num_requests=args.max_num_requests,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len or longest,
        prefix_caching=False,
        num_threads=args.threads,
        ops_backend=args.ops_backend,
        load_format="safetensors" if has_weights else "dummy",
        kv_dtype=args.kv_dtype,
        quantization=QuantizationConfig(online=args.quantize),
        speculative=SpeculativeConfig(num_tokens=args.speculative) if args.speculative else None,
        metrics=metrics,
        profile=profile,
        tensor_parallel_size=args.tensor_parallel_size,
        compilation=CompilationConfig(graph_mode=args.graph_mode, capture=args.capture, capture_sizes=sizes),
    )


def our_generate(engine: LLMEngine) -> Generate:
    """Our engine as a function from prompts to outputs."""

    def generate(prompts: Prompts, output_len: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        return [output["token_ids"] for output in engine.generate(prompts, params)]

    return generate


def transformers_generate(directory: Path) -> Generate:
    """`transformers` generate with its default settings for CPUs, as a function from prompts to outputs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(prompts: Prompts, output_len: int) -> list[list[int]]:
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


def measure(ours: Generate, peer: Generate | None, workload: Workload, *, repeats: int, engine: LLMEngine) -> Row:
    """One workload: a short warm-up of both, then alternating repeats."""
    generator = torch.Generator().manual_seed(workload.num_requests)

    def prompts(length: int) -> Prompts:
        shape = (workload.num_requests, length)
        found: Prompts = torch.randint(engine.info.vocab_size, shape, generator=generator).tolist()
        return found

    for generate in (ours, peer):
        if generate is not None:
            generate(prompts(min(8, workload.input_len)), min(8, workload.output_len))
    our_s, peer_s, equal = [], [], []
    for _ in range(repeats):
        repeat = prompts(workload.input_len)
        seconds, our_outputs = timed(ours, repeat, workload.output_len)
        our_s.append(seconds)
        if peer is not None:
            seconds, peer_outputs = timed(peer, repeat, workload.output_len)
            peer_s.append(seconds)
            equal += [a == b for a, b in zip(our_outputs, peer_outputs)]
    num_output = workload.num_requests * workload.output_len
    return Row(
        workload=workload,
        seconds=min(our_s),
        all_seconds=our_s,
        output_tokens_per_s=num_output / min(our_s),
        all_tokens_per_s=(num_output + workload.num_requests * workload.input_len) / min(our_s),
        peer_tokens_per_s=num_output / statistics.median(peer_s) if peer_s else None,
        ratio=statistics.median(b / a for a, b in zip(our_s, peer_s)) if peer_s else None,
        equal_outputs=sum(equal) / len(equal) if equal else None,
    )


def timed(generate: Generate, prompts: Prompts, output_len: int) -> tuple[float, list[list[int]]]:
    """Seconds, and the outputs."""
    start_s = time.perf_counter()
    outputs = generate(prompts, output_len)
    return time.perf_counter() - start_s, outputs


if __name__ == "__main__":
    main()
