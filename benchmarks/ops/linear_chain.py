"""Times the products of decoder layers in a row, with what comes between them: python -m benchmarks.ops.linear_chain

Kernels that are launched programmatically load weights while those before them end, which products alone do not show:
here a layer is norm, query-key-value product, a pause as long as attention takes, output product, norm, gates and down
product, and layers with weights of their own follow each other in a captured graph. Each way to cut is one line: as
chosen, without `gemv_hopper`, or with it cut so (`--cuts warps,stages,inputs`). NVIDIA only: the pause asks its clock.
"""

from __future__ import annotations

import argparse
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from atom_cluster.ops.linear import LinearOp, gated_product
from atom_cluster.ops.triton import add_rms_norm, linear, silu_and_mul
from atom_cluster.ops.triton.gemv_hopper import GemvBlocks
from atom_cluster.ops.triton.programmatic import launch_options, let_next_start, wait_for_inputs
from benchmarks.ops.linear import BITS, make_op
from benchmarks.ops.timing import share_of_bandwidth, time_us

MODELS = {
    "llama-8b": (4096, 6144, 4096, 14336),
    "llama-1b": (2048, 3072, 2048, 8192),
    "qwen3-0.6b": (1024, 4096, 2048, 3072),
}
"""Hidden size, outputs of the first product, inputs of the second, outputs of gates."""


def pause(x: torch.Tensor, size: int, nanoseconds: int) -> torch.Tensor:
    """The first columns of the input, some time later."""
    out = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
    grid = (size // 128, len(x))
    _pause_kernel[grid](x, out, x.stride(0), out.stride(0), nanoseconds, BLOCK=128, num_warps=4, **launch_options())
    return out


@triton.jit
def _pause_kernel(x_ptr, out_ptr, x_stride, out_stride, nanoseconds, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    x = tl.load(x_ptr + tl.program_id(1) * x_stride + column)
    begin = globaltimer()
    now = begin
    while now - begin < nanoseconds:
        now = globaltimer()
    tl.store(out_ptr + tl.program_id(1) * out_stride + column, x)


class Chain:
    """Layers of a model's shape."""

    def __init__(self, model: str, kind: str, num_layers: int, pause_ns: int) -> None:
        hidden, num_qkv, self.num_mixed, num_gates = MODELS[model]
        self.norm = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        shapes = ((num_qkv, hidden), (hidden, self.num_mixed), (2 * num_gates, hidden), (hidden, num_gates))
        self.layers: list[list[LinearOp]] = [[make_op(kind, *shape) for shape in shapes] for _ in range(num_layers)]
        self.num_bytes = num_layers * sum(rows * columns for rows, columns in shapes) * BITS[kind] / 8
        self.pause_ns = pause_ns

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> the same"""
        residual = torch.zeros_like(x)
        for qkv, mix, gates, down in self.layers:
            normed, residual = add_rms_norm(x, residual, self.norm, 1e-5)
            x = mix(pause(qkv(normed), self.num_mixed, self.pause_ns))
            normed, residual = add_rms_norm(x, residual, self.norm, 1e-5)
            x = down(gated_product(gates, normed, silu_and_mul))
        return x


def cut(text: str) -> GemvBlocks:
    """Of the command line."""
    warps, stages, inputs = map(int, text.split(","))
    return GemvBlocks(inputs=inputs, num_warps=warps, num_stages=stages)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-8b"], choices=list(MODELS))
    parser.add_argument("--kinds", nargs="+", default=["bfloat16", "fp8"], choices=sorted(BITS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--cuts", type=cut, nargs="*", default=[], help="warps,stages,inputs of every product")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pause", type=float, default=6.0, help="microseconds")
    args = parser.parse_args()
    for model in args.models:
        for kind in args.kinds:
            chain = Chain(model, kind, args.layers, round(args.pause * 1e3))
            for num_tokens in args.tokens:
                x = torch.randn(num_tokens, MODELS[model][0], device="cuda", dtype=torch.bfloat16)
                print(f"{model} {kind}, {num_tokens} tokens: chosen    {measured(chain, x)}")
                for blocks in (None, *args.cuts):
                    with mock.patch.object(linear, "hopper_blocks", lambda *_, blocks=blocks: blocks):
                        print(f"    {blocks or 'without gemv_hopper'}    {measured(chain, x)}", flush=True)


def measured(chain: Chain, x: torch.Tensor) -> str:
    """Microseconds of a layer, and what of its weights is read meanwhile."""
    step_us = time_us([lambda: chain(x)])
    return f"{step_us / len(chain.layers):8.2f} us a layer    {share_of_bandwidth(chain.num_bytes, step_us)}"


if __name__ == "__main__":
    main()
