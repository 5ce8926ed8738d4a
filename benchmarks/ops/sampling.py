"""Choice of tokens on a GPU: python -m benchmarks.ops.sampling

Logits are found in the cache as far as it holds them, as behind the head that wrote them; shown against the bytes of
reading them once. Beside it torch's argmax, or its sort for rows that truncate.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from atom_cluster.messages.requests import SamplingParams
from atom_cluster.ops import torch_ref as ref
from atom_cluster.ops import triton as kernels
from atom_cluster.ops.sampling import Draw, DrawnRows, SampleTokens, SamplingTensors
from atom_cluster.ops.step_inputs import RowTables
from atom_cluster.runner.sampling_table import SamplingTable
from benchmarks.ops.timing import share_of_bandwidth, time_us

CASES = {
    "greedy": (Draw.GREEDY, [{"temperature": 0.0}]),
    "greedy, may truncate": (Draw.TRUNCATED, [{"temperature": 0.0}]),
    "random": (Draw.RANDOM, [{}]),
    "top-p 0.9": (Draw.TRUNCATED, [{"top_p": 0.9}]),
    "top-k 20, top-p 0.95": (Draw.TRUNCATED, [{"temperature": 0.6, "top_k": 20, "top_p": 0.95}]),
    "top-k 1000": (Draw.TRUNCATED, [{"top_k": 1000}]),
    "min-p 0.05": (Draw.TRUNCATED, [{"min_p": 0.05}]),
    "half greedy": (Draw.TRUNCATED, [{"temperature": 0.0}, {"top_p": 0.9}]),
}


def tensors_of(rows: list[SamplingParams]) -> SamplingTensors:
    table = SamplingTable(num_rows=len(rows), device=torch.device("cuda"))
    for row, sampling in enumerate(rows):
        table.fill(row, sampling, num_prompt_tokens=1, ending_token_ids=())
    table.flush()
    return table.tensors


def measure_choice(num_rows: int, vocab_size: int, dtype: torch.dtype, *, with_reference: bool) -> None:
    logits = [(torch.randn(num_rows, vocab_size, device="cuda") * 3).to(dtype) for _ in range(2)]
    index = torch.arange(num_rows, device="cuda")
    position = index + 5
    for name, (draw, kinds) in CASES.items():
        rows = [SamplingParams(**kinds[i % len(kinds)], seed=i) for i in range(num_rows)]
        params = tensors_of(rows)

        def time(sample: SampleTokens, draw: Draw = draw, params: SamplingTensors = params) -> float:
            return time_us([partial(sample, x, index, position, params, draw=draw) for x in logits])

        ours = time(kernels.sample)
        theirs = ""
        if draw is Draw.GREEDY:
            theirs = f"argmax {time_us([partial(torch.argmax, x, -1) for x in logits]):8.1f} us"
        elif with_reference:
            theirs = f"torch  {time(ref.sample):8.1f} us"
        rate = share_of_bandwidth(num_rows * vocab_size * dtype.itemsize, ours)
        print(f"[{num_rows:3}, {vocab_size}] {str(dtype)[6:]:8} {name:22} {ours:8.1f} us {rate}  {theirs}", flush=True)


def measure_rest(num_rows: int, vocab_size: int) -> None:
    rows = [SamplingParams(frequency_penalty=0.1, repetition_penalty=1.1, seed=i) for i in range(num_rows)]
    params, index = tensors_of(rows), torch.arange(num_rows, device="cuda")
    logits = torch.randn(num_rows, vocab_size, device="cuda")
    tokens = torch.randint(0, vocab_size, (num_rows + 1, 8192), dtype=torch.int32, device="cuda")
    position = torch.full_like(index, 2000)
    ours = time_us([partial(kernels.adjust, logits, index, position, params, tokens)])
    print(f"[{num_rows:3}, {vocab_size}] penalties of 2000 tokens {ours:8.1f} us")
    known = torch.ones(num_rows + 1, dtype=torch.int64, device="cuda")
    tables = RowTables(tokens=tokens, num_known=known, pages=(), block_size=16)
    for max_drafts in (0, 3):
        drawn = torch.randint(0, 9, (num_rows * (max_drafts + 1),), device="cuda")
        step = DrawnRows(
            row=index,
            first_sample=index * (max_drafts + 1),
            newest_position=position,
            num_drafts=torch.full_like(index, max_drafts),
            max_drafts=max_drafts,
            padding_row=num_rows,
        )
        ours = time_us([partial(kernels.accept, drawn, step, tables)])
        theirs = time_us([partial(ref.accept, drawn, step, tables)])
        print(f"[{num_rows:3}] accept {max_drafts} drafts {ours:8.1f} us, torch {theirs:8.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128, 256])
    parser.add_argument("--vocab-sizes", nargs="+", type=int, default=[128256, 151936])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--with-reference", action="store_true", help="also time torch's sort")
    args = parser.parse_args()
    for vocab_size in args.vocab_sizes:
        for num_rows in args.rows:
            for dtype in args.dtypes:
                measure_choice(num_rows, vocab_size, getattr(torch, dtype), with_reference=args.with_reference)
            measure_rest(num_rows, vocab_size)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
