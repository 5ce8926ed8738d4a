"""Times the products of decoder layers in a row, with what comes between them: python -m benchmarks.ops.linear_chain

Kernels that are launched programmatically load weights while those before them end, which products alone do not show:
here norms and products follow each other as in a layer, with pauses as long as attention or experts take, and layers
with weights of their own follow each other in a captured graph. Each way to cut is one line: as chosen, without
`gemv_hopper`, or with it cut so (`--cuts 4,4,128`: warps, stages and inputs of every product, or of one after the
other: `4,4,128/8,3,128/old/4,5,128`). NVIDIA only: the pause asks its clock.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import cast
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


@dataclass(frozen=True, slots=True)
class Product:
    outputs: int
    inputs: int
    gates: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """What reads no weights, and turns outputs of the product before it into inputs of the one behind it."""

    microseconds: float
    outputs: int


NORM = "norm"
"""With the residual stream added."""
Step = Product | Pause | str


def dense(hidden: int, qkv: int, mixed: int, gates: int) -> tuple[Step, ...]:
    """A layer with attention and an MLP: hidden size, outputs of the first product, inputs of the second, gates."""
    attention = (NORM, Product(qkv, hidden), Pause(1.5, qkv), Pause(4.5, mixed), Product(hidden, mixed))
    return (*attention, NORM, Product(2 * gates, hidden, gates=True), Product(hidden, gates))


LATENT_ATTENTION = (
    *(NORM, Product(2112, 7168), Pause(2.0, 1536), Product(24576, 1536), Pause(8.0, 4096), Pause(12.0, 16384)),
    *(Product(7168, 16384), NORM),
)
MODELS: dict[str, tuple[Step, ...]] = {
    "llama-8b": dense(4096, 6144, 4096, 14336),
    "llama-1b": dense(2048, 3072, 2048, 8192),
    "llama-3b": dense(3072, 5120, 3072, 8192),
    "qwen3-0.6b": dense(1024, 4096, 2048, 3072),
    "qwen3-4b": dense(2560, 6144, 4096, 9728),
    "qwen3-30b": (
        *(NORM, Product(5120, 2048), Pause(1.5, 5120), Pause(4.5, 4096), Product(2048, 4096), NORM, Pause(30.0, 2048)),
    ),
    "deepseek-v3": (*LATENT_ATTENTION, Product(4096, 7168, gates=True), Product(7168, 2048), Pause(60.0, 7168)),
    "deepseek-v3-dense": (*LATENT_ATTENTION, Product(36864, 7168, gates=True), Product(7168, 18432)),
}


class Chain:
    """Layers of a model's shape."""

    def __init__(self, steps: tuple[Step, ...], kind: str, num_layers: int) -> None:
        self.steps = steps
        self.products = [step for step in steps if isinstance(step, Product)]
        self.hidden = self.products[0].inputs
        self.norm = torch.ones(self.hidden, device="cuda", dtype=torch.bfloat16)
        self.layers: list[list[LinearOp]] = [
            [make_op(kind, product.outputs, product.inputs) for product in self.products] for _ in range(num_layers)
        ]
        self.num_bytes = num_layers * sum(p.outputs * p.inputs for p in self.products) * BITS[kind] / 8

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> the same"""
        residual = torch.zeros_like(x)
        for ops in self.layers:
            left = iter(ops)
            for step in self.steps:
                if isinstance(step, Pause):
                    x = pause(x, step.outputs, round(step.microseconds * 1e3))
                elif isinstance(step, Product):
                    x = gated_product(next(left), x, silu_and_mul) if step.gates else next(left)(x)
                else:
                    x, residual = add_rms_norm(x, residual, self.norm, 1e-5)
        return x


def pause(x: torch.Tensor, size: int, nanoseconds: int) -> torch.Tensor:
    """The first columns of the input, again and again, some time later."""
    out = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
    strides = (x.stride(0), out.stride(0))
    grid = (size // 128, len(x))
    _pause_kernel[grid](x, out, *strides, x.shape[1], nanoseconds, BLOCK=128, num_warps=4, **launch_options())
    return out


@triton.jit
def _pause_kernel(
    x_ptr, out_ptr, x_stride, out_stride, width, nanoseconds, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAPS)
    let_next_start(OVERLAPS)
    x = tl.load(x_ptr + tl.program_id(1) * x_stride + column % width)
    begin = globaltimer()
    now = begin
    while now - begin < nanoseconds:
        now = globaltimer()
    tl.store(out_ptr + tl.program_id(1) * out_stride + column, x)


Cuts = list[GemvBlocks | None]
"""Of the products of a layer; None: by other kernels."""


def cuts(text: str) -> Cuts:
    """Of the command line."""

    def cut(part: str) -> GemvBlocks | None:
        if part == "old":
            return None
        warps, stages, inputs = map(int, part.split(","))
        return GemvBlocks(inputs=inputs, num_warps=warps, num_stages=stages)

    return [cut(part) for part in text.split("/")]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-8b"], choices=list(MODELS))
    parser.add_argument("--kinds", nargs="+", default=["bfloat16", "fp8"], choices=sorted(BITS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--cuts", type=cuts, nargs="*", default=[], help="warps,stages,inputs")
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    for model in args.models:
        for kind in args.kinds:
            chain = Chain(MODELS[model], kind, args.layers)
            for num_tokens in args.tokens:
                x = torch.randn(num_tokens, chain.hidden, device="cuda", dtype=torch.bfloat16)
                print(f"{model} {kind}, {num_tokens} tokens: chosen    {measured(chain, x)}")
                for ways in cast("list[Cuts]", [[None], *args.cuts]):
                    by_shape = {
                        (product.outputs, product.inputs): ways[index if len(ways) > 1 else 0]
                        for index, product in enumerate(chain.products)
                    }

                    def chosen(
                        _: str,
                        num_out: int,
                        num_in: int,
                        __: int,
                        found: dict[tuple[int, int], GemvBlocks | None] = by_shape,
                    ) -> GemvBlocks | None:
                        return found[num_out, num_in]

                    with mock.patch.object(linear, "hopper_blocks", chosen):
                        text = " / ".join(
                            f"{way.num_warps},{way.num_stages},{way.inputs}" if way else "without gemv_hopper"
                            for way in ways
                        )
                        print(f"    {text}    {measured(chain, x)}", flush=True)


def measured(chain: Chain, x: torch.Tensor) -> str:
    """Microseconds of a layer, and what of its weights is read meanwhile."""
    step_us = time_us([lambda: chain(x)])
    return f"{step_us / len(chain.layers):8.2f} us a layer    {share_of_bandwidth(chain.num_bytes, step_us)}"


if __name__ == "__main__":
    main()
