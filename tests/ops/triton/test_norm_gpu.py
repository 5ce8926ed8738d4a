"""Norms, gates and lookups on a GPU, in all dtypes and at sizes of real models, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.ops import torch_ref as ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ERROR = {torch.bfloat16: 5e-3, torch.float16: 8e-4, torch.float32: 1e-6}
SHAPES = [(1, 4096), (3, 512), (700, 7168), (2, 16384), (1000, 96), (5, 5120), (0, 64), (33, 1)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What is allocated next has NaNs in it, wherever nothing is written."""
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (1 << 26, *[1 << 16] * 8, *[1 << 8] * 32)]
    del blocks


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == wanted.shape and found.is_contiguous()
    assert float((found.double() - wanted).norm()) <= ERROR[dtype] * float(wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from atom_cluster.ops import triton as kernels

    x, residual, weight = randn(*shape, dtype=dtype) * 3, randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype)
    for weight in (weight, weight.float()):  # noqa: B020
        assert_near(kernels.rms_norm(x, weight, 1e-5), ref.rms_norm(x.double(), weight.double(), 1e-5), dtype)
        total = x + residual
        found, found_total = kernels.add_rms_norm(x, residual.clone(), weight, 1e-5)
        assert torch.equal(found_total, total)
        assert_near(found, ref.rms_norm(total.double(), weight.double(), 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("num_tokens", [1, 7, 3000])
def test_norms_of_heads(num_tokens: int, size: int, dtype: torch.dtype) -> None:
    from atom_cluster.ops import triton as kernels

    fused, gate = randn(num_tokens, 9, size, dtype=dtype), randn(num_tokens, 5, 2 * size, dtype=dtype)[..., size:]
    weight = randn(size, dtype=dtype)
    heads = fused[:, 2:7]
    assert_near(kernels.rms_norm(heads, weight, 1e-6), ref.rms_norm(heads.double(), weight.double(), 1e-6), dtype)
    wanted = ref.gated_rms_norm(heads.double(), gate.double(), weight.double(), 1e-6)
    assert_near(kernels.gated_rms_norm(heads, gate, weight, 1e-6), wanted, dtype)
    for some_gate in (gate, gate[..., :1], gate[:, :1, :1].expand(-1, 5, -1)):
        for addend in (None, fused[:, :5]):
            wanted = ref.sigmoid_and_mul(heads.double(), some_gate.double(), addend)
            assert_near(kernels.sigmoid_and_mul(heads, some_gate, addend), wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 28672), (7, 6), (3000, 1536), (2, 3, 2050)], ids=str)
@pytest.mark.parametrize("limit", [None, 0.7])
def test_activations(shape: tuple[int, ...], dtype: torch.dtype, limit: float | None) -> None:
    from atom_cluster.ops import triton as kernels

    gate_up = randn(*shape, dtype=dtype) * 2
    for name in ("silu_and_mul", "gelu_tanh_and_mul"):
        wanted = getattr(ref, name)(gate_up.double(), limit)
        assert_near(getattr(kernels, name)(gate_up, limit), wanted, dtype)


@pytest.mark.parametrize("shard", [None, range(0, 100), range(100, 200), range(150, 197)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lookups(dtype: torch.dtype, shard: range | None) -> None:
    from atom_cluster.ops import triton as kernels

    rows, ids = (
        randn(200 if shard is None else len(shard), 2050, dtype=torch.float16),
        torch.randperm(200, device="cuda"),
    )
    rows = rows if dtype != torch.bfloat16 else rows.to(dtype)
    for factor in (1.0, 45.25):
        wanted = ref.look_up(rows, ids, dtype=dtype, factor=factor, shard=shard)
        assert torch.equal(kernels.look_up(rows, ids, dtype=dtype, factor=factor, shard=shard), wanted)
