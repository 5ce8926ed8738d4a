"""Products with plain and with quantized weights are right on a GPU, for odd shapes and memory full of NaNs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from atom_cluster.ops.linear import LinearOp, gated_product, normalized_product
from atom_cluster.ops.number_formats import float8_to_fnuz
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight, dequantize
from atom_cluster.ops.select import float8_dtype_of
from atom_cluster.ops.torch_ref.quantized import round_inputs as round_by_reference
from atom_cluster.ops.triton import (
    add_rms_norm,
    gelu_tanh_and_mul,
    prepare_linear,
    prepare_quantized_linear,
    runtime,
    silu_and_mul,
)
from atom_cluster.ops.triton.gemv_hopper import GemvBlocks, Norm, Rounding, gemv_hopper, is_fit
from atom_cluster.ops.triton.quantize import quantize_inputs
from atom_cluster.platform.detect import detect_platform
from atom_cluster.quantization.quantize import QUANTIZERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

TOKENS = (1, 2, 3, 4, 5, 8, 9, 16, 31, 33, 64, 100, 128, 129, 300, 700)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def poison() -> None:
    """Leaves NaNs in memory that is allocated next."""
    blocks = [torch.full((size,), torch.nan, device="cuda") for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24)]
    del blocks


def rounded_inputs(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """With the kernel's codes, which have a test of their own: numbers in the middle of two may go either way."""
    spec = weight.inputs
    if spec is None or spec.scale_format == "e8m0":
        return round_by_reference(x.float(), weight).double()
    float8_dtype = weight.codes.dtype if weight.number == "float8" else torch.float8_e4m3fn
    codes, scale = quantize_inputs(x, spec, float8_dtype=float8_dtype, static_scale=weight.input_scale)
    return codes.double() * scale.double().repeat_interleave(spec.group_size or x.shape[1], 1)[:, : x.shape[1]]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_plain_weights(dtype: torch.dtype, seed: int) -> None:
    generator = random.Random(seed)
    num_out = generator.choice([1, 7, 64, 130, 1024, 4096, 6144, 30001])
    num_in = generator.choice([1, 17, 128, 1000, 1024, 4096, 3584])
    torch.manual_seed(seed)
    weight, bias = (
        torch.randn(num_out, num_in, device="cuda", dtype=dtype),
        torch.randn(num_out, device="cuda", dtype=dtype),
    )
    for has_bias, out_dtype in ((True, None), (False, torch.float32)):
        op = prepare_linear(weight, bias if has_bias else None, dtype=dtype, out_dtype=out_dtype)
        for num_tokens in TOKENS:
            # Of a wider tensor: what a fused projection gives its parts.
            x = torch.randn(num_tokens, num_in + 8, device="cuda", dtype=dtype)[:, :num_in]
            poison()
            y = op(x)
            assert y.dtype == (out_dtype or dtype)
            expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
            tolerance = 1e-5 if out_dtype == torch.float32 else TOLERANCE[dtype]
            assert error(y, expected) < tolerance, (num_out, num_in, num_tokens, out_dtype)


def forms() -> dict[str, Callable[[torch.Tensor], QuantizedWeight]]:
    static = InputQuantization(number="float8", is_static=True)

    def with_inputs(name: str, inputs: InputQuantization | None) -> Callable[[torch.Tensor], QuantizedWeight]:
        return lambda w: replace(QUANTIZERS[name](w), inputs=inputs, input_scale=torch.tensor(0.01, device="cuda"))

    def per_tensor(w: torch.Tensor) -> QuantizedWeight:
        found = QUANTIZERS["fp8"](w)
        return replace(found, scale=found.scale[:1].contiguous(), block=tuple(w.shape))

    def int4_per_128(w: torch.Tensor) -> QuantizedWeight:
        found = QUANTIZERS["int4"](w)
        zero = torch.randint(0, 16, (len(w), w.shape[1] // 128), device="cuda").to(torch.int16)
        return replace(found, scale=found.scale[:, ::4].half().float().contiguous(), zero=zero, block=(1, 128))

    def reordered(w: torch.Tensor) -> QuantizedWeight:
        return replace(QUANTIZERS["int4"](w), input_group=torch.randperm(w.shape[1], device="cuda") // 32)

    return dict(QUANTIZERS) | {
        "fp8 static": with_inputs("fp8", static),
        "fp8 per tensor": per_tensor,
        "fp8 weights alone": with_inputs("fp8_block", None),
        "int8 weights alone": with_inputs("int8", None),
        "mxfp4 and mxfp8": with_inputs("mxfp4", InputQuantization(number="float8", group_size=32, scale_format="e8m0")),
        "int4 per 128": int4_per_128,
        "int4 reordered": reordered,
    }


@pytest.mark.parametrize("name", forms())
@pytest.mark.parametrize("shape", [(4096, 1024), (320, 2176), (2112, 7168), (24, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@torch.inference_mode()
def test_quantized_weights(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = forms()[name](torch.randn(shape, device="cuda"))
    platform = detect_platform("auto")
    if weight.number == "float8" and float8_dtype_of(platform) == torch.float8_e4m3fnuz:
        codes, scale = float8_to_fnuz(weight.codes, weight.scale)
        weight = replace(weight, codes=codes, scale=scale)
    bias = torch.randn(shape[0], device="cuda", dtype=dtype)
    op = prepare_quantized_linear(weight, bias, dtype=dtype)
    assert "reference" not in op.name
    numbers = dequantize(weight, torch.float64)
    # Units that multiply eight-bit floats add their products up in fewer bits than float32 has.
    is_narrow = weight.number == "float8" and weight.inputs is not None and weight.inputs.number == "float8"
    limit = 4e-3 if dtype == torch.bfloat16 else 5e-4 if is_narrow else 2e-5
    for num_tokens in TOKENS if dtype == torch.bfloat16 else (1, 5, 40, 200):
        x = torch.randn(num_tokens, shape[1], device="cuda", dtype=dtype) * 0.5
        poison()
        y = op(x)
        expected = rounded_inputs(x, weight) @ numbers.T + bias.double()
        assert error(y, expected) < limit, num_tokens


@pytest.mark.parametrize("name", ["plain", "fp8", "fp8_block", "int4"])
@pytest.mark.parametrize("shape", [(28672, 4096), (6144, 4096), (500, 1024)], ids=str)
@torch.inference_mode()
def test_gates_are_applied_to_rounded_outputs(name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    if name == "plain":
        op: LinearOp = prepare_linear(weight, None, dtype=torch.bfloat16)
    elif float8_dtype_of(detect_platform("auto")) == torch.float8_e4m3fnuz and name.startswith("fp8"):
        pytest.skip("quantizers make the other kind of float8")
    else:
        op = prepare_quantized_linear(QUANTIZERS[name](weight.float()), None, dtype=torch.bfloat16)
    for num_tokens in (1, 2, 5, 8, 40):
        x = torch.randn(num_tokens, shape[1], device="cuda", dtype=torch.bfloat16) * 0.1
        for activation in (silu_and_mul, gelu_tanh_and_mul):
            expected = activation(op(x)).double()
            poison()
            assert error(gated_product(op, x, activation), expected) < 1e-3, num_tokens


@pytest.mark.parametrize("kind", ["plain", "fp8", "fp8_block"])
@pytest.mark.parametrize("seed", range(20))
@torch.inference_mode()
def test_hopper_kernel_of_any_cut(kind: str, seed: int) -> None:
    if not runtime.is_hopper():
        pytest.skip("for sm_90")
    generator = random.Random(seed)
    torch.manual_seed(seed)
    num_tokens, num_in = generator.randint(1, 8), generator.choice([1024, 1536, 2048, 2304, 4096, 7168])
    if num_tokens > 4:
        num_in = min(num_in, 4096)  # a program holds the inputs of all tokens
    num_out = generator.choice([16, 100, 1536, 2112, 4098])
    gates, has_bias = generator.random() < 0.5, generator.random() < 0.5
    inputs_at_a_time = {"plain": [64, 128], "fp8": [128, 256], "fp8_block": [128]}[kind]
    blocks = GemvBlocks(
        inputs=generator.choice(inputs_at_a_time),
        num_warps=generator.choice([4, 8]),
        num_stages=generator.choice([2, 3, 4]),
    )
    plain = torch.randn(num_out, num_in, device="cuda", dtype=torch.bfloat16) * 0.05
    bias = torch.randn(num_out, device="cuda", dtype=torch.bfloat16) if has_bias else None
    x = torch.randn(num_tokens, num_in + 16, device="cuda", dtype=torch.bfloat16)[:, :num_in]
    x[0] *= 30
    norm, total, seen = None, None, x
    if num_tokens <= 2 and generator.random() < 0.5:
        residual, weight_of_norm = torch.randn_like(x), torch.rand(num_in, device="cuda", dtype=torch.bfloat16) + 0.5
        x = x.contiguous()
        seen, total = add_rms_norm(x, residual.clone(), weight_of_norm, 1e-5)
        norm = Norm(residual_TI=residual, weight_I=weight_of_norm, eps=1e-5, sum_TI=torch.full_like(x, torch.nan))
    codes, rounding, inputs, numbers = plain, None, seen.double(), plain.double()
    if kind != "plain":
        weight = QUANTIZERS[kind](plain.float())
        codes, inputs, numbers = weight.codes, rounded_inputs(seen, weight), dequantize(weight, torch.float64)
        rounding = Rounding(of_outputs=weight.scale, block=weight.block, limit=448.0, max_abs=torch.inf)
    expected = (inputs @ numbers.T + (0 if bias is None else bias.double())).bfloat16()
    if gates:
        expected = silu_and_mul(expected)
    poison()
    out = torch.full_like(expected, torch.nan)
    assert is_fit(x, codes, blocks.inputs) or num_in % 1024
    gemv_hopper(x, codes, bias, out, blocks, rounding, norm=norm, gates=gates)
    # Roots may differ in the last bit, and what is in the middle of two numbers goes either way then: codes, and gates.
    assert error(out, expected.double()) < (5e-3 if norm is None and not gates else 1e-2)
    assert norm is None or total is None or torch.equal(norm.sum_TI, total)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 40])
@pytest.mark.parametrize("shape", [(6144, 1024), (6144, 2048), (28672, 4096), (500, 96)], ids=str)
@torch.inference_mode()
def test_normalized_products_are_those_of_norm_and_product(shape: tuple[int, int], num_tokens: int) -> None:
    torch.manual_seed(0)
    op = prepare_linear(torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.1, None, dtype=torch.bfloat16)
    x, residual = (torch.randn(num_tokens, shape[1], device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.rand(shape[1], device="cuda", dtype=torch.bfloat16) + 0.5
    for activation in (None, silu_and_mul):
        normed, total = add_rms_norm(x, residual.clone(), weight, 1e-5)
        expected = op(normed) if activation is None else activation(op(normed))
        poison()
        y, found = normalized_product(op, add_rms_norm, x, residual.clone(), weight, 1e-5, activation)
        assert torch.equal(found, total)
        assert error(y, expected.double()) < 4e-3


@pytest.mark.parametrize("num_in", [128, 300, 4096, 20000])
@torch.inference_mode()
def test_codes_and_scales_are_those_of_the_reference(num_in: int) -> None:
    x = torch.randn(33, num_in, device="cuda", dtype=torch.bfloat16)
    for spec in (InputQuantization(number="float8"), InputQuantization(number="int8", group_size=128)):
        codes = torch.zeros(1, num_in, device="cuda", dtype=torch.float8_e4m3fn)
        like = QuantizedWeight(
            number="float8", codes=codes, scale=torch.ones(1, 1, device="cuda"), block=(1, num_in), inputs=spec
        )
        poison()
        found, scale = quantize_inputs(x, spec)
        spread = scale.repeat_interleave(spec.group_size or num_in, 1)[:, :num_in]
        assert error(found.float() * spread, round_by_reference(x.float(), like).double()) < 5e-3


@torch.inference_mode()
def test_captured_steps_repeat() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(512, 4096, device="cuda").bfloat16(), torch.zeros(16, 4096, device="cuda").bfloat16()
    ops = [
        prepare_linear(weight, None, dtype=torch.bfloat16),
        prepare_quantized_linear(QUANTIZERS["int4"](weight.float()), None, dtype=torch.bfloat16),
    ]
    for op in ops:
        op(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = op(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(y, op(x))
