"""Products of some tokens by sm_90's kernel are right on a GPU, for odd shapes and memory full of NaNs."""

from __future__ import annotations

import random

import pytest
import torch

from atom_cluster.ops.triton import runtime, silu_and_mul
from atom_cluster.ops.triton.gemm import Scales
from atom_cluster.ops.triton.gemm_hopper import gemm_hopper, is_fit
from atom_cluster.ops.triton.gemm_hopper_cut import HopperBlocks
from atom_cluster.ops.triton.linear import new_counters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no sm_90 here"
    ),
]

CUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
"""Groups, pieces."""


def poison() -> None:
    """Leaves NaNs in memory that is allocated next."""
    blocks = [torch.full((size,), torch.nan, device="cuda") for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24)]
    del blocks


def numbers(kind: str, rows: int, columns: int) -> torch.Tensor:
    x = torch.randn(rows, columns, device="cuda") * 0.5
    return x.bfloat16() if kind == "bfloat16" else x.to(torch.float8_e4m3fn)


def scales_of(
    kind: str, num_tokens: int, num_out: int, num_in: int
) -> tuple[Scales | None, torch.Tensor, torch.Tensor]:
    """And what inputs and weights are multiplied by, element by element."""
    if kind == "bfloat16":
        one = torch.ones(1, 1, device="cuda", dtype=torch.float64)
        return None, one, one
    if kind == "channels":
        of_tokens, of_outputs = torch.rand(num_tokens, 1, device="cuda"), torch.rand(num_out, 1, device="cuda")
        scales = Scales(of_tokens_TG=of_tokens, of_outputs=of_outputs, group_in=num_in, block=(1, num_in))
        return scales, of_tokens.double(), of_outputs.double()
    groups = -(-num_in // 128)
    of_tokens = torch.rand(groups, -(-num_tokens // 4) * 4, device="cuda").T[:num_tokens]
    of_outputs = torch.rand(-(-num_out // 128), groups, device="cuda")
    scales = Scales(of_tokens_TG=of_tokens, of_outputs=of_outputs, group_in=128, block=(128, 128))
    spread = of_outputs.repeat_interleave(128, 0)[:num_out].repeat_interleave(128, 1)[:, :num_in]
    return scales, of_tokens.double().repeat_interleave(128, 1)[:, :num_in], spread.double()


@pytest.mark.parametrize("kind", ["bfloat16", "channels", "blocks"])
@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_products(kind: str, seed: int) -> None:
    generator = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(2):
        num_tokens = generator.choice([1, 2, 9, 16, 17, 31, 33, 64, 65, 100, 128, 129, 200, 256])
        num_in = generator.choice([16, 128, 528, 1024, 2064, 4096, 7168])
        groups, pieces = generator.choice(CUTS)
        gates = pieces == 2 and generator.random() < 0.5
        num_out = 128 * generator.randint(1, 40) if gates else 16 * generator.randint(1, 300)
        tokens = min(128, max(32 if kind == "blocks" else 16, 1 << (num_tokens - 1).bit_length()))
        blocks = HopperBlocks(
            groups=groups,
            pieces=pieces,
            tokens=tokens,
            splits=generator.choice([1, 1, 2, 3, 5, 8, 16]),
            num_stages=3,
            lines=generator.choice([1, 2]),
        )
        x, weight = numbers(kind, num_tokens, num_in), numbers(kind, num_out, num_in)
        bias = torch.randn(num_out, device="cuda").bfloat16() if generator.random() < 0.5 else None
        scales, of_x, of_weight = scales_of(kind, num_tokens, num_out, num_in)
        expected = (x.double() * of_x) @ (weight.double() * of_weight).T + (0 if bias is None else bias.double())
        if gates:
            expected = silu_and_mul(expected.bfloat16()).double()
        rounds = new_counters(num_out, x.device)
        assert is_fit(x, weight, torch.bfloat16)
        before = None
        for _ in range(2):
            poison()
            out = torch.full(expected.shape, torch.nan, device="cuda", dtype=torch.bfloat16)
            gemm_hopper(x, weight, bias, out, rounds, blocks, scales, gates=gates)
            error = float((out.double() - expected).norm() / expected.norm())
            assert error < 5e-3, (num_tokens, num_out, num_in, blocks, gates, error)
            assert not (rounds % 64).any()
            assert before is None or torch.equal(out, before)
            before = out


@torch.inference_mode()
def test_captured_steps_that_overlap_repeat() -> None:
    assert runtime.is_hopper()
    weights, bias = [numbers("bfloat16", 1024, 4096) for _ in range(4)], torch.randn(1024, device="cuda").bfloat16()
    x = torch.zeros(100, 4096, device="cuda").bfloat16()
    blocks = HopperBlocks(groups=2, pieces=2, tokens=128, splits=8, num_stages=4)
    rounds = [new_counters(1024, x.device) for _ in weights]
    outs = [torch.empty(100, 1024, device="cuda").bfloat16() for _ in weights]

    def step() -> None:
        for weight, out, counts in zip(weights, outs, rounds, strict=True):
            gemm_hopper(x, weight, bias, out, counts, blocks)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(20):
        x.normal_()
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        for weight, out in zip(weights, outs, strict=True):
            expected = x.double() @ weight.double().T + bias.double()
            assert float((out.double() - expected).norm() / expected.norm()) < 5e-3
