"""Weights reach AITER in its layouts, and its results are what the reference computes; with a stand-in for AITER."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atom_cluster.ops import torch_ref as ref
from atom_cluster.ops.aiter import FAMILIES
from atom_cluster.ops.moe import ExpertActivation, ExpertsOp, RoutingRule
from atom_cluster.ops.number_formats import e8m0_codes, float4_codes, pack_nibbles, scale_for, to_float8
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight
from atom_cluster.ops.select import torch_table
from atom_cluster.ops.table import OpTable
from tests.ops.aiter import stand_in

HALF = torch.bfloat16
FNUZ = torch.float8_e4m3fnuz


@pytest.fixture(params=stand_in.SIGNATURES)
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return stand_in.install(monkeypatch, request.param)


def ops_by_aiter(family: str, *, has_float4: bool = True) -> OpTable:
    behind = replace(torch_table("behind"), float8_dtype=FNUZ)
    return replace(behind, **FAMILIES[family].ops(behind, has_float4))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: torch.Tensor, expected: torch.Tensor, error: float = 0.01) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found.float() - expected.float()).norm() <= error * expected.float().norm()


def float8_blocks(*shape: int, seed: int = 0) -> QuantizedWeight:
    weight = randn(*shape, seed=seed) * 0.1
    tiles = weight.unflatten(-2, (-1, 128)).unflatten(-1, (-1, 128))
    scale = tiles.abs().amax((-3, -1)) / torch.finfo(FNUZ).max
    codes = to_float8(tiles / scale[..., :, None, :, None], FNUZ).flatten(-2).flatten(-3, -2)
    inputs = InputQuantization(number="float8", group_size=128)
    return QuantizedWeight(number="float8", codes=codes, scale=scale, block=(128, 128), inputs=inputs)


def float8_channels(*shape: int, seed: int = 0, rows: int = 1) -> QuantizedWeight:
    weight = randn(*shape, seed=seed) * 0.1
    groups = weight.unflatten(-2, (-1, rows))
    scale = groups.abs().amax((-2, -1)) / torch.finfo(FNUZ).max
    codes = to_float8(groups / scale[..., None, None], FNUZ).flatten(-3, -2)
    inputs = InputQuantization(number="float8")
    return QuantizedWeight(number="float8", codes=codes, scale=scale[..., None], block=(rows, shape[-1]), inputs=inputs)


def float4(*shape: int, seed: int = 0) -> QuantizedWeight:
    groups = (randn(*shape, seed=seed) * 0.1).unflatten(-1, (-1, 32))
    scale = scale_for(groups.abs().amax(-1), 6.0, "e8m0")
    codes = pack_nibbles(float4_codes(groups / scale[..., None]).flatten(-2))
    inputs = InputQuantization(number="float4", group_size=32, scale_format="e8m0")
    return QuantizedWeight(number="float4", codes=codes, scale=e8m0_codes(scale), block=(1, 32), inputs=inputs)


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(calls: list[str], *, has_bias: bool) -> None:
    ops = ops_by_aiter("linear")
    weight, x = randn(24, 40, seed=1), randn(5, 40).to(HALF)
    bias = randn(24, seed=2) if has_bias else None
    op = ops.prepare_linear(weight, bias, dtype=HALF)
    assert_near(op(x), ref.prepare_linear(weight, bias, dtype=HALF)(x))
    assert calls == ["gemm_a16w16"] and "aiter" in op.name
    assert op(x[:0]).shape == (0, 24)


def test_sums_that_are_not_rounded_are_left_to_the_backend_behind(calls: list[str]) -> None:
    op = ops_by_aiter("linear").prepare_linear(randn(8, 8), None, dtype=HALF, out_dtype=torch.float32)
    assert op(randn(2, 8).to(HALF)).dtype == torch.float32
    assert ops_by_aiter("linear").prepare_linear(randn(8, 8), None, dtype=torch.float32)(randn(2, 8)).shape == (2, 8)
    assert not calls


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("weight", "called"),
    [
        (float8_blocks(256, 384), ["per_group_quant_hip", "gemm_a8w8_blockscale_bpreshuffle"]),
        (float8_channels(48, 256), ["per_token_quant_hip", "gemm_a8w8_bpreshuffle"]),
        (float8_channels(48, 256, rows=24), ["per_token_quant_hip", "gemm_a8w8_bpreshuffle"]),
        (float8_channels(48, 256, rows=48), ["per_token_quant_hip", "gemm_a8w8_bpreshuffle"]),
        (float4(48, 256), ["per_1x32_f4_quant_hip", "gemm_a4w4"]),
    ],
    ids=["blocks", "channels", "halves", "tensor", "float4"],
)
def test_quantized_linear(
    weight: QuantizedWeight, called: list[str], num_tokens: int, monkeypatch: pytest.MonkeyPatch, *, has_bias: bool
) -> None:
    calls = stand_in.install(monkeypatch)
    x = randn(num_tokens, weight.num_in).to(HALF)
    bias = randn(weight.num_out, seed=3) if has_bias else None
    op = ops_by_aiter("quantized_linear").prepare_quantized_linear(weight, bias, dtype=HALF)
    assert_near(op(x), ref.prepare_quantized_linear(weight, bias, dtype=HALF)(x))
    assert [name for name in calls if "shuffle" not in name or "gemm" in name] == called
    assert op(x[:0]).shape == (0, weight.num_out)


@pytest.mark.parametrize(
    "weight",
    [
        replace(float8_blocks(128, 128), inputs=None),
        replace(float8_channels(16, 128), codes=torch.zeros(16, 128).to(torch.float8_e4m3fn)),
        float8_channels(24, 128),
        float8_channels(16, 96),
        replace(float8_channels(16, 128), inputs=InputQuantization(number="float8", max_abs=1.0)),
        float8_channels(16, 128, rows=1),
    ],
    ids=["plain inputs", "another float8", "odd outputs", "odd inputs", "bounded", "float32"],
)
def test_other_quantized_weights_are_left_to_the_backend_behind(calls: list[str], weight: QuantizedWeight) -> None:
    is_last = weight.num_in == 128 and weight.num_out == 16 and weight.codes.dtype == FNUZ
    dtype = torch.float32 if is_last and weight.inputs == InputQuantization(number="float8") else HALF
    op = ops_by_aiter("quantized_linear").prepare_quantized_linear(weight, None, dtype=dtype)
    assert op(randn(2, weight.num_in).to(dtype)).shape == (2, weight.num_out)
    assert not calls and "aiter" not in op.name


def test_four_bits_need_a_chip_that_multiplies_them(calls: list[str]) -> None:
    ops = ops_by_aiter("quantized_linear", has_float4=False)
    assert "aiter" not in ops.prepare_quantized_linear(float4(16, 128), None, dtype=HALF).name
    ops = ops_by_aiter("quantized_experts", has_float4=False)
    op = prepare_quantized(ops, float4(2, 512, 256), float4(2, 256, 256))
    assert "aiter" not in op.name and not calls


def prepare_quantized(ops: OpTable, gate_up: QuantizedWeight, down: QuantizedWeight) -> ExpertsOp:
    return ops.prepare_quantized_experts(
        gate_up, down, gate_up_bias=None, down_bias=None, activation=ExpertActivation(), dtype=HALF
    )


# The last expert is used by nobody, and 4 stands for one of another rank.
EXPERTS = torch.tensor([[0, 3, 1], [3, 4, 0], [4, 4, 4], [2, 0, 4]])


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [
        (float8_blocks(4, 256, 256), float8_blocks(4, 256, 128, seed=1)),
        (float8_channels(4, 64, 96), float8_channels(4, 96, 32, seed=1)),
        (float8_channels(4, 64, 96, rows=32), float8_channels(4, 96, 32, seed=1, rows=96)),
        (float4(4, 512, 256), float4(4, 256, 256, seed=1)),
    ],
    ids=["blocks", "channels", "tensors", "float4"],
)
def test_quantized_experts(calls: list[str], gate_up: QuantizedWeight, down: QuantizedWeight) -> None:
    x, weight = randn(4, gate_up.num_in).to(HALF), torch.rand(4, 3)
    op = prepare_quantized(ops_by_aiter("quantized_experts"), gate_up, down)
    expected = prepare_quantized(torch_table("reference"), gate_up, down)(x, EXPERTS, weight)
    # The reference rounds between the products in another place, and so other numbers to eight or four bits.
    assert_near(op(x, EXPERTS, weight), expected, error=0.1 if gate_up.number == "float4" else 0.03)
    assert calls[-1] == "fused_moe" and "aiter" in op.name
    torch.testing.assert_close(op(x, EXPERTS, weight, addend_TD=x), op(x, EXPERTS, weight) + x)
    assert op(x[:0], EXPERTS[:0], weight[:0]).shape == (0, gate_up.num_in)


@pytest.mark.parametrize("size", [64, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_experts(calls: list[str], size: int, *, has_bias: bool) -> None:
    gate_up, down = randn(4, 2 * size, 96) * 0.1, randn(4, 96, size, seed=1) * 0.1
    x, weight = randn(4, 96).to(HALF), torch.rand(4, 3)
    bias = randn(4, 96, seed=3).to(HALF) if has_bias else None
    found, expected = (
        ops.prepare_experts(
            gate_up, down, gate_up_bias=None, down_bias=bias, activation=ExpertActivation(), dtype=HALF
        )(x, EXPERTS, weight)
        for ops in (ops_by_aiter("experts"), torch_table("reference"))
    )
    assert_near(found, expected)
    assert ("fused_moe" in calls) == (size == 64 and not has_bias)


@pytest.mark.parametrize(
    ("rule", "called"),
    [
        (RoutingRule(experts_per_token=3), "topk_softmax"),
        (RoutingRule(experts_per_token=3, renormalize=True, scale=2.5), "topk_softmax"),
        (RoutingRule(experts_per_token=3, score="softmax_of_chosen"), None),
        (RoutingRule(experts_per_token=3, renormalize=True, renorm_eps=0.1), None),
        (RoutingRule(experts_per_token=3, score="sqrt_softplus", renormalize=True), None),
        (RoutingRule(experts_per_token=3, num_groups=4, topk_groups=2), None),
    ],
)
def test_routing_without_bias(calls: list[str], rule: RoutingRule, called: str | None) -> None:
    check_routing(rule, None)
    assert calls == ([] if called is None else [called])


@pytest.mark.parametrize(
    ("rule", "called"),
    [
        (RoutingRule(experts_per_token=3, score="sigmoid", renormalize=True, renorm_eps=1e-20, scale=2.5), True),
        (RoutingRule(experts_per_token=3, score="sigmoid", renormalize=True, num_groups=4, topk_groups=2), True),
        (RoutingRule(experts_per_token=3, score="sigmoid", num_groups=4, topk_groups=2), False),
        (
            RoutingRule(
                experts_per_token=3, score="sigmoid", renormalize=True, num_groups=4, topk_groups=2, group_score="max"
            ),
            False,
        ),
        (RoutingRule(experts_per_token=3, score="softmax", renormalize=True), False),
    ],
)
def test_routing_with_bias(calls: list[str], rule: RoutingRule, *, called: bool) -> None:
    check_routing(rule, randn(16, seed=1).abs() * 0.3)
    assert calls == (["biased_grouped_topk"] if called else [])


def check_routing(rule: RoutingRule, bias: torch.Tensor | None) -> None:
    logits = randn(7, 16)
    route = ops_by_aiter("routing").route
    (found, weight), (expected, expected_weight) = route(logits, bias, rule), ref.route(logits, bias, rule)
    assert torch.equal(found, expected) and found.dtype == torch.int64
    torch.testing.assert_close(weight, expected_weight)
    assert route(logits[:0], bias, rule)[0].shape == (0, 3)


def test_experts_that_are_chosen_already_are_left_to_the_backend_behind(calls: list[str]) -> None:
    rule, chosen = RoutingRule(experts_per_token=2, renormalize=True), torch.tensor([[1, 5]])
    found, weight = ops_by_aiter("routing").route(randn(1, 16), None, rule, expert_TK=chosen)
    assert torch.equal(found, chosen) and not calls and weight.sum() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("weight_dtype", [HALF, torch.float32])
def test_norms(calls: list[str], dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    ops = ops_by_aiter("norm")
    x, residual, weight = randn(3, 2, 24).to(dtype), randn(3, 2, 24, seed=1).to(dtype), randn(24).to(weight_dtype)
    assert_near(ops.rms_norm(x, weight, 1e-5), ref.rms_norm(x, weight, 1e-5))
    strided = x.transpose(0, 1)
    assert_near(ops.rms_norm(strided, weight, 1e-5), ref.rms_norm(strided, weight, 1e-5))
    expected, expected_total = ref.add_rms_norm(x, residual, weight, 1e-5)
    found, total = ops.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert_near(found, expected)
    assert torch.equal(total, expected_total)
    assert calls == (["rmsnorm2d_fwd", "rmsnorm2d_fwd_with_add"] if dtype == weight_dtype == HALF else [])


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_activations(calls: list[str], name: str) -> None:
    found, expected = getattr(ops_by_aiter("activation"), name), getattr(ref, name)
    x = randn(3, 2, 24).to(HALF)
    assert_near(found(x), expected(x))
    assert calls == [name]
    for other in (x.float(), x.transpose(0, 1), x[:0]):
        assert found(other).shape == expected(other).shape
    assert_near(found(x, 0.5), expected(x, 0.5))
    assert calls == [name]
