"""Every backend computes what the contract of each op says; the reference is written out here in float64."""

import pytest
import torch

from atom_cluster.config.ops import OpsConfig
from atom_cluster.ops.linear import gated_product, normalized_product
from atom_cluster.ops.select import select_ops
from atom_cluster.ops.table import OpTable
from atom_cluster.platform.detect import detect_platform

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
CASES = [(backend, dtype) for backend in ("torch", "cpu") for dtype in TOLERANCE] + [("triton", torch.float32)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def case(request: pytest.FixtureRequest) -> tuple[OpTable, torch.dtype]:
    backend, dtype = request.param
    return select_ops(OpsConfig(backend=backend), detect_platform("cpu"), dtype), dtype


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_matches(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(case: tuple[OpTable, torch.dtype], stored: torch.dtype, has_bias: bool) -> None:
    ops, dtype = case
    x, weight = randn(5, 24, dtype=dtype), (randn(9, 24, dtype=dtype, seed=1) * 0.1).to(stored)
    bias = randn(9, dtype=dtype, seed=2) if has_bias else None
    before = weight.clone()
    y = ops.prepare_linear(weight, bias, dtype=dtype)(x)
    expected = x.double() @ weight.to(dtype).double().T + (0 if bias is None else bias.double())
    assert_matches(y, expected, dtype)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 5])
def test_linear_with_sums_of_float32(case: tuple[OpTable, torch.dtype], num_tokens: int) -> None:
    ops, dtype = case
    wide = torch.promote_types(dtype, torch.float32)
    x, weight, bias = (
        randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(num_tokens, 300), (9, 300), (9,)])
    )
    y = ops.prepare_linear(weight, bias, dtype=dtype, out_dtype=wide)(x)
    assert y.dtype == wide
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(
        y.double(), x.double() @ weight.double().T + bias.double(), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_gates_of_a_linear_op(case: tuple[OpTable, torch.dtype], num_tokens: int, name: str) -> None:
    ops, dtype = case
    op = ops.prepare_linear(randn(10, 24, dtype=dtype, seed=1), randn(10, dtype=dtype, seed=2), dtype=dtype)
    x, activation = randn(num_tokens, 24, dtype=dtype), getattr(ops, name)
    assert_matches(gated_product(op, x, activation), activation(op(x)).double(), dtype)


@pytest.mark.parametrize("name", [None, "silu_and_mul"])
def test_normalized_product(case: tuple[OpTable, torch.dtype], name: str | None) -> None:
    ops, dtype = case
    activation = None if name is None else getattr(ops, name)
    op = ops.prepare_linear(randn(10, 24, dtype=dtype), None, dtype=dtype)
    x, residual, weight = randn(3, 24, dtype=dtype, seed=1), randn(3, 24, dtype=dtype, seed=2), randn(24, dtype=dtype)
    normed, total = ops.add_rms_norm(x, residual.clone(), weight, 1e-5)
    expected = op(normed) if activation is None else activation(op(normed))
    y, found = normalized_product(op, ops.add_rms_norm, x, residual, weight, 1e-5, activation)
    assert torch.equal(found, total)
    assert_matches(y, expected.double(), dtype)


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24)])
def test_rms_norm(case: tuple[OpTable, torch.dtype], shape: tuple[int, ...]) -> None:
    ops, dtype = case
    x, weight = randn(*shape, dtype=dtype) * 3, randn(24, dtype=dtype, seed=1)
    assert_matches(ops.rms_norm(x, weight, 1e-5), norm_in_float64(x, weight), dtype)


def test_add_rms_norm(case: tuple[OpTable, torch.dtype]) -> None:
    ops, dtype = case
    x, residual, weight = (randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(7, 24), (7, 24), (24,)]))
    total = (x + residual).clone()
    normed, new_residual = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(new_residual, total)
    assert_matches(normed, norm_in_float64(total, weight), dtype)


def test_norms_of_heads_within_a_wider_tensor(case: tuple[OpTable, torch.dtype]) -> None:
    ops, dtype = case
    heads, weight = randn(4, 5, 24, dtype=dtype)[:, 1:3], randn(24, dtype=dtype, seed=1)
    normed = ops.rms_norm(heads, weight, 1e-5)
    assert normed.is_contiguous()
    assert_matches(normed, norm_in_float64(heads, weight), dtype)


def test_a_wide_weight_is_multiplied_before_rounding(case: tuple[OpTable, torch.dtype]) -> None:
    ops, dtype = case
    x, residual, weight = randn(7, 24, dtype=dtype), randn(7, 24, dtype=dtype, seed=1), randn(24, dtype=torch.float64)
    weight = weight.to(torch.promote_types(dtype, torch.float32))
    total = x + residual
    wanted = norm_in_float64(total, weight).to(dtype)
    for found in (ops.rms_norm(total, weight, 1e-5), ops.add_rms_norm(x, residual, weight, 1e-5)[0]):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5)


def norm_in_float64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 6])
def test_rotary_turns_pairs(case: tuple[OpTable, torch.dtype], rotary_dim: int, is_interleaved: bool) -> None:
    ops, dtype = case
    angle = randn(5, 1, rotary_dim // 2, dtype=torch.promote_types(dtype, torch.float32), seed=9) * 5
    cos, sin = angle.cos(), angle.sin()
    fused = randn(5, 5, 8, dtype=dtype)
    query, key = fused[:, :3], fused[:, 3:]
    expected = [turned(heads, angle.double(), is_interleaved) for heads in (query, key)]
    angles = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    found = ops.rotary(query, key, *angles, is_interleaved=is_interleaved)
    for actual, wanted in zip(found, expected):
        assert_matches(actual, wanted, dtype)


def turned(heads: torch.Tensor, angle: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    """Each pair as a complex number, times e^(i angle)."""
    half = angle.shape[-1]
    first, second, rest = heads.double().split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    if is_interleaved:
        pair = torch.view_as_complex(torch.cat((first, second), -1).unflatten(-1, (half, 2)))
        turned_pair = pair * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((torch.view_as_real(turned_pair).flatten(-2), rest), dim=-1)
    pair = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pair.real, pair.imag, rest), dim=-1)


@pytest.mark.parametrize("limit", [None, 0.4])
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_activations(case: tuple[OpTable, torch.dtype], name: str, limit: float | None) -> None:
    ops, dtype = case
    gate_up = randn(4, 12, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    activated = gate / (1 + (-gate).exp()) if name == "silu_and_mul" else gate * (1 + inner.tanh()) / 2
    assert_matches(getattr(ops, name)(gate_up, limit), activated * up, dtype)


@pytest.mark.parametrize("has_addend", [False, True])
@pytest.mark.parametrize("is_scalar", [False, True])
def test_sigmoid_and_mul(case: tuple[OpTable, torch.dtype], is_scalar: bool, has_addend: bool) -> None:
    ops, dtype = case
    x, gate = randn(4, 3, 6, dtype=dtype), randn(4, 3, 12, dtype=dtype, seed=1)[..., 11 if is_scalar else 6 :]
    addend = randn(4, 3, 6, dtype=dtype, seed=2) if has_addend else None
    expected = x.double() / (1 + (-gate.double()).exp()) + (0 if addend is None else addend.double())
    assert_matches(ops.sigmoid_and_mul(x, gate, addend), expected, dtype)


def test_look_up_in_a_shard(case: tuple[OpTable, torch.dtype]) -> None:
    ops, dtype = case
    rows, ids = randn(5, 6, dtype=torch.bfloat16), torch.tensor([4, 0, 7, 3, 8, 2])
    found = ops.look_up(rows, ids, dtype=dtype, factor=3.0, shard=range(3, 8))
    expected = torch.stack([rows[i - 3] if 3 <= i < 8 else torch.zeros_like(rows[0]) for i in ids.tolist()])
    assert torch.equal(found, expected.to(dtype) * 3.0)
    inside = torch.tensor([4, 0, 3])
    assert torch.equal(ops.look_up(rows, inside, dtype=dtype), rows[inside].to(dtype))
