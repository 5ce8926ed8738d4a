"""Kernels of quantized weights compute what the reference does, whichever form a weight has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight
from atom_cluster.ops.torch_ref.quantized import prepare_quantized_linear as prepare_reference
from atom_cluster.ops.torch_ref.quantized import round_inputs as round_by_reference
from atom_cluster.ops.triton import prepare_quantized_linear, runtime
from atom_cluster.ops.triton.gemm import GemmBlocks, gemm
from atom_cluster.ops.triton.gemm_packed import dequantize_packed
from atom_cluster.ops.triton.linear import new_counters
from atom_cluster.ops.triton.linear_quantized import CodesLinear
from atom_cluster.ops.triton.pack import pack_weight
from atom_cluster.ops.triton.quantize import quantize_inputs, round_inputs
from atom_cluster.quantization.quantize import QUANTIZERS

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="tensors of the CPU need the interpreter")

NUM_OUT, NUM_IN = 40, 256


def weights() -> dict[str, QuantizedWeight]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(NUM_OUT, NUM_IN, generator=generator)
    found = {name: quantize(weight) for name, quantize in QUANTIZERS.items()}
    int4 = found["int4"]
    of_two_groups = torch.rand(NUM_OUT, 2, generator=generator)
    static = InputQuantization(number="float8", is_static=True)
    return found | {
        "fp8 static": replace(found["fp8"], inputs=static, input_scale=torch.tensor(0.01)),
        "fp8 per tensor": replace(found["fp8"], scale=found["fp8"].scale[:1].contiguous(), block=(NUM_OUT, NUM_IN)),
        "fp8 weights alone": replace(found["fp8_block"], inputs=None),
        "int8 weights alone": replace(found["int8"], inputs=None),
        "int4 symmetric": replace(int4, zero=None),
        "int4 per channel": replace(int4, scale=of_two_groups[:, :1].contiguous(), zero=None, block=(1, NUM_IN)),
        "int4 per 128": replace(
            int4, scale=of_two_groups, zero=torch.randint(0, 16, (NUM_OUT, 2)).to(torch.int16), block=(1, 128)
        ),
        "int4 reordered": replace(int4, input_group=torch.randperm(NUM_IN, generator=generator) // 32),
        "mxfp4 and mxfp8": replace(found["mxfp4"], inputs=found["mxfp8"].inputs),
        "int4 per 8": replace(int4, scale=int4.scale.repeat_interleave(4, 1), zero=None, block=(1, 8)),
    }


@pytest.mark.parametrize("name", weights())
def test_products(name: str) -> None:
    weight, bias = weights()[name], torch.randn(NUM_OUT)
    op = prepare_quantized_linear(weight, bias, dtype=torch.float32)
    assert ("reference" in op.name) == (name == "int4 per 8"), op.name
    reference = prepare_reference(weight, bias, dtype=torch.float32)
    assert op(torch.randn(0, NUM_IN)).shape == (0, NUM_OUT)
    for num_tokens in (1, 18):
        x = torch.randn(num_tokens, NUM_IN)
        torch.testing.assert_close(op(x), reference(x), atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("is_weight_cut", [False, True])
def test_one_scale_for_any_number_of_inputs(is_weight_cut: bool) -> None:
    """Where only weights, or only inputs, have a scale per group, the others' one may be for inputs that fill none."""
    weight = weights()["fp8_block" if is_weight_cut else "fp8"]
    group_size = None if is_weight_cut else 64
    scale = weight.scale[:, :2] if is_weight_cut else weight.scale
    cut = replace(
        weight,
        codes=weight.codes[:, :200].contiguous(),
        scale=scale.contiguous(),
        block=weight.block if is_weight_cut else (1, 200),
        inputs=InputQuantization(number="float8", group_size=group_size),
    )
    op, x = prepare_quantized_linear(cut, None, dtype=torch.float32), torch.randn(3, 200)
    assert isinstance(op, CodesLinear)
    torch.testing.assert_close(op(x), prepare_reference(cut, None, dtype=torch.float32)(x), atol=2e-4, rtol=1e-5)


def test_inputs_that_do_not_fill_blocks() -> None:
    int4 = weights()["int4"]
    cut = replace(int4, codes=int4.codes[:, :72], scale=int4.scale[:, :5], zero=None)
    x = torch.randn(3, 144)
    expected = prepare_reference(cut, None, dtype=torch.float32)(x)
    torch.testing.assert_close(prepare_quantized_linear(cut, None, dtype=torch.float32)(x), expected)


@pytest.mark.parametrize("name", ["int4", "mxfp4", "mxfp8", "fp8 weights alone"])
def test_weights_as_floats(name: str) -> None:
    weight = replace(weights()[name], inputs=None)
    packed = pack_weight(weight)
    assert packed is not None
    expected = prepare_reference(weight, None, dtype=torch.float32)(torch.eye(NUM_IN)).T
    torch.testing.assert_close(dequantize_packed(packed.weight, slice(3, 39), torch.float32), expected[3:39])


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_programs_that_share_outputs(splits: int) -> None:
    x, weight, bias = torch.randn(5, 200), torch.randn(NUM_OUT, 200), torch.randn(NUM_OUT)
    counters = new_counters(NUM_OUT, x.device)
    for _ in range(2):
        out = torch.full((5, NUM_OUT), torch.nan)
        gemm(x, weight, bias, out, counters, GemmBlocks(outputs=16, tokens=16, inputs=32, splits=splits))
        torch.testing.assert_close(out, x @ weight.T + bias, atol=1e-4, rtol=1e-4)
        assert not counters.any()


INPUTS = [
    InputQuantization(number="float8"),
    InputQuantization(number="float8", max_abs=1.5),
    InputQuantization(number="float8", is_static=True),
    InputQuantization(number="float8", group_size=128),
    InputQuantization(number="float8", group_size=32, scale_format="e8m0"),
    InputQuantization(number="float4", group_size=32, scale_format="e8m0"),
    InputQuantization(number="int8"),
    InputQuantization(number="int8", group_size=20),
]


@pytest.mark.parametrize("spec", INPUTS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("num_in", [300, 1024])
def test_rounded_inputs(spec: InputQuantization, num_in: int) -> None:
    x = torch.randn(5, num_in) * torch.tensor([1, 1e-3, 100, 0, 1e-30])[:, None]
    scale = torch.tensor(0.01)
    codes = torch.zeros(1, num_in, dtype=torch.float8_e4m3fn)
    weight = QuantizedWeight(
        number="float8", codes=codes, scale=torch.ones(1, 1), block=(1, num_in), inputs=spec, input_scale=scale
    )
    expected = round_by_reference(x, weight)
    assert_rounded(round_inputs(x, spec, static_scale=scale), expected, spec)
    if spec.number == "float4":
        return
    for by_group in (False, True):
        found, found_scale = quantize_inputs(x, spec, static_scale=scale, scales_by_group=by_group)
        spread = found_scale.repeat_interleave(spec.group_size or num_in, 1)[:, :num_in]
        assert_rounded(found.float() * spread, expected, spec)


def test_tokens_are_filled_up_for_the_library() -> None:
    x, spec = torch.randn(5, 256), InputQuantization(number="float8", group_size=128)
    codes, scale = quantize_inputs(x, spec, scales_by_group=True, token_multiple=4)
    exact_codes, exact_scale = quantize_inputs(x, spec)
    assert codes.shape == (8, 256) and scale.shape == (8, 2) and scale.stride() == (1, 8)
    assert torch.equal(codes[:5].float(), exact_codes.float()) and torch.equal(scale[:5], exact_scale)


def assert_rounded(found: torch.Tensor, expected: torch.Tensor, spec: InputQuantization) -> None:
    """The same, but where a number lies in the middle of two: kernels multiply with inverses of scales."""
    if spec.scale_format == "e8m0":
        assert torch.equal(found, expected)
        return
    is_same = (found - expected).abs() <= 1e-6 * expected.abs()
    assert is_same.float().mean() > 0.99
    torch.testing.assert_close(found, expected, rtol=0.13, atol=float(expected.abs().amax()) * 2e-2)
