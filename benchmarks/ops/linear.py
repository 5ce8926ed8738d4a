"""Times linear layers as models use them: python -m benchmarks.ops.linear --kinds bfloat16 fp8 --tokens 1 16 128

For each shape and number of tokens: microseconds (median of graph replays over enough layers that no cache holds their
weights), bytes of weights per second and products per second, each also as a share of what this GPU was seen to do, and
the time of torch's product with bfloat16 weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.triton import prepare_linear, prepare_quantized_linear
from atom_cluster.quantization.quantize import QUANTIZERS

SHAPES = {
    "llama-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    "qwen3-0.6b": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)),
    "qwen3-30b": ((5120, 2048), (2048, 4096), (151936, 2048)),
    "deepseek-v3": (
        *((2112, 7168), (24576, 1536), (7168, 16384), (36864, 7168)),
        *((7168, 18432), (4096, 7168), (7168, 2048)),
    ),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 8192)
CACHE_BYTES = 200e6
BITS = {"bfloat16": 16.0, "fp8": 8.0, "fp8_block": 8.0, "int8": 8.0, "mxfp8": 8.25, "mxfp4": 4.25, "int4": 5.5}
"""Of a weight, with its share of scales."""


def make_op(kind: str, num_out: int, num_in: int) -> LinearOp:
    weight = torch.randn(num_out, num_in, device="cuda", dtype=torch.bfloat16) * 0.02
    if kind == "bfloat16":
        return prepare_linear(weight, None, dtype=torch.bfloat16)
    return prepare_quantized_linear(QUANTIZERS[kind](weight.float()), None, dtype=torch.bfloat16)


def seconds(calls: list[Callable[[], object]]) -> float:
    """Of one call, taken in turn."""
    for call in calls:
        call()
    rounds = max(1, 12 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[2] / 1e3 / (rounds * len(calls))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["bfloat16"], choices=sorted(BITS))
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--bandwidth", type=float, default=4244, help="GB/s that the memory was seen to give")
    parser.add_argument("--rate", type=float, default=780, help="TFLOP/s of bfloat16 products that were seen")
    args = parser.parse_args()
    print("kind             out x in tokens        us   GB/s  share  TFLOP/s  share  torch us")
    for kind in args.kinds:
        for num_out, num_in in dict.fromkeys(shape for model in args.models for shape in SHAPES[model]):
            size = num_out * num_in * BITS[kind] / 8
            ops = [make_op(kind, num_out, num_in) for _ in range(1 + int(CACHE_BYTES / size))]
            num_plain = 1 + int(CACHE_BYTES / (2 * num_out * num_in))
            plain = [torch.randn(num_out, num_in, device="cuda").bfloat16() for _ in range(num_plain)]
            for num_tokens in args.tokens:
                if num_tokens > 256 and num_out > 100_000:
                    continue
                x = torch.randn(num_tokens, num_in, device="cuda", dtype=torch.bfloat16)
                ours = seconds([partial(op, x) for op in ops])
                torchs = seconds([partial(F.linear, x, weight) for weight in plain])
                read, done = size / ours / 1e9, 2 * num_out * num_in * num_tokens / ours / 1e12
                shares = read / args.bandwidth, done / args.rate
                print(
                    f"{kind:10} {f'{num_out}x{num_in}':>14} {num_tokens:6} {ours * 1e6:9.1f} {read:6.0f} "
                    f"{shares[0]:6.0%} {done:8.1f} {shares[1]:6.0%} {torchs * 1e6:9.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
