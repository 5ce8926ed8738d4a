"""Products with plain and with quantized weights, of few tokens and of many."""

from collections.abc import Callable
from dataclasses import replace

import torch

from atom_cluster.ops.linear import LinearOp, gated_product, normalized_product
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight
from atom_cluster.ops.triton import linear, linear_quantized, runtime
from atom_cluster.ops.triton.activation import silu_and_mul
from atom_cluster.ops.triton.gemm import Scales
from atom_cluster.ops.triton.gemm_hopper import gemm_hopper
from atom_cluster.ops.triton.gemm_hopper_cut import HopperBlocks
from atom_cluster.ops.triton.gemm_packed import dequantize_packed
from atom_cluster.ops.triton.gemv_hopper import GemvBlocks, Rounding, gemv_hopper
from atom_cluster.ops.triton.norm import add_rms_norm
from atom_cluster.ops.triton.pack import pack_weight

HALF = torch.bfloat16
OUTPUTS, INPUTS = 256, 4096


def gated(num_tokens: int, weight: QuantizedWeight | None = None) -> None:
    """Of a shape whose gates are applied in the same kernel."""
    if weight is None:
        op: LinearOp = linear.prepare_linear(torch.empty(6144, INPUTS, dtype=HALF), None, dtype=HALF)
    else:
        op = linear_quantized.prepare_quantized_linear(weight, None, dtype=HALF)
    gated_product(op, torch.empty(num_tokens, INPUTS, dtype=HALF), silu_and_mul)
    op(torch.empty(num_tokens, INPUTS, dtype=HALF))


def normalized() -> None:
    """Of a shape whose inputs are normalised in the same kernel."""
    op = linear.prepare_linear(torch.empty(6144, 1024, dtype=HALF), None, dtype=HALF)
    x, residual = torch.empty(1, 1024, dtype=HALF), torch.empty(1, 1024, dtype=HALF)
    normalized_product(op, add_rms_norm, x, residual, torch.empty(1024, dtype=HALF), 1e-5, silu_and_mul)


def wide_float8_channels() -> QuantizedWeight:
    codes = torch.empty(6144, INPUTS, dtype=float8_dtype())
    return replace(float8_channels(), codes=codes, scale=torch.empty(6144, 1))


def by_hopper(num_tokens: int, weight: QuantizedWeight) -> None:
    """What tables may choose on that chip; elsewhere, what they choose."""
    if not runtime.is_hopper():
        quantized(num_tokens, lambda: weight)
        return
    x, out = torch.empty(num_tokens, INPUTS, dtype=HALF), torch.empty(num_tokens, OUTPUTS, dtype=HALF)
    rounding = Rounding(of_outputs=weight.scale, block=weight.block, limit=448.0, max_abs=torch.inf)
    blocks = GemvBlocks(inputs=128, num_warps=8, num_stages=3)
    gemv_hopper(x, weight.codes, torch.empty(OUTPUTS, dtype=HALF), out, blocks, rounding)


def by_gemm_hopper(num_tokens: int, blocks: HopperBlocks, weight: QuantizedWeight | None = None) -> None:
    """What tables may choose on that chip; elsewhere, what they choose."""
    if not runtime.is_hopper():
        plain(1) if weight is None else quantized(num_tokens, lambda: weight)
        return
    gates = blocks.pieces == 2 and blocks.splits == 1
    dtype = HALF if weight is None else weight.codes.dtype
    x, out = torch.empty(num_tokens, INPUTS, dtype=dtype), torch.empty(num_tokens, OUTPUTS >> gates, dtype=HALF)
    scales = None
    if weight is not None:
        groups = INPUTS // weight.block[1]
        scale = torch.empty(groups, num_tokens).T
        scales = Scales(of_tokens_TG=scale, of_outputs=weight.scale, group_in=weight.block[1], block=weight.block)
    codes = torch.empty(OUTPUTS, INPUTS, dtype=HALF) if weight is None else weight.codes
    bias, rounds = torch.empty(OUTPUTS, dtype=HALF), linear.new_counters(OUTPUTS, x.device)
    gemm_hopper(x, codes, bias, out, rounds, blocks, scales, gates=gates)


def cut(groups: int, pieces: int, tokens: int, splits: int, num_stages: int, lines: int = 1) -> HopperBlocks:
    return HopperBlocks(groups=groups, pieces=pieces, tokens=tokens, splits=splits, num_stages=num_stages, lines=lines)


def plain(num_tokens: int, dtype: torch.dtype = HALF) -> None:
    op = linear.prepare_linear(torch.empty(OUTPUTS, INPUTS, dtype=dtype), None, dtype=dtype, out_dtype=torch.float32)
    op(torch.empty(num_tokens, INPUTS, dtype=dtype))


def quantized(num_tokens: int, make: Callable[[], QuantizedWeight]) -> None:
    bias = torch.empty(OUTPUTS, dtype=HALF)
    op = linear_quantized.prepare_quantized_linear(make(), bias, dtype=HALF)
    assert "reference" not in op.name
    op(torch.empty(num_tokens, INPUTS, dtype=HALF))


def float8_dtype() -> torch.dtype:
    return torch.float8_e4m3fnuz if runtime.arch() == "gfx942" else torch.float8_e4m3fn


def float8_blocks() -> QuantizedWeight:
    return QuantizedWeight(
        number="float8",
        codes=torch.empty(OUTPUTS, INPUTS, dtype=float8_dtype()),
        scale=torch.empty(OUTPUTS // 128, INPUTS // 128),
        block=(128, 128),
        inputs=InputQuantization(number="float8", group_size=128),
    )


def float8_channels() -> QuantizedWeight:
    scale = torch.empty(OUTPUTS, 1)
    return replace(float8_blocks(), scale=scale, block=(1, INPUTS), inputs=InputQuantization(number="float8"))


def int8_channels() -> QuantizedWeight:
    codes = torch.empty(OUTPUTS, INPUTS, dtype=torch.int8)
    return replace(float8_channels(), number="int8", codes=codes, inputs=InputQuantization(number="int8"))


def mxfp8() -> QuantizedWeight:
    scale = torch.empty(OUTPUTS, INPUTS // 32, dtype=torch.uint8)
    inputs = InputQuantization(number="float8", group_size=32, scale_format="e8m0")
    return replace(float8_blocks(), scale=scale, block=(1, 32), inputs=inputs)


def mxfp4() -> QuantizedWeight:
    codes = torch.empty(OUTPUTS, INPUTS // 2, dtype=torch.uint8)
    return replace(mxfp8(), number="float4", codes=codes, inputs=None)


def int4() -> QuantizedWeight:
    groups = (OUTPUTS, INPUTS // 128)
    zero = torch.zeros(groups, dtype=torch.int16)
    return replace(mxfp4(), number="int4", scale=torch.empty(groups), block=(1, 128), zero=zero)


def as_floats(make: Callable[[], QuantizedWeight]) -> None:
    packed = pack_weight(make())
    assert packed is not None
    dequantize_packed(packed.weight, slice(0, 128), HALF)


LAUNCHES: dict[str, Callable[[], None]] = {
    "bfloat16_1": lambda: plain(1),
    "bfloat16_4": lambda: plain(4),
    "gated_bfloat16": lambda: gated(1),
    "normalized_bfloat16": normalized,
    "gated_float8": lambda: gated(1, wide_float8_channels()),
    "hopper_float8_channels": lambda: by_hopper(3, float8_channels()),
    "hopper_float8_blocks": lambda: by_hopper(1, float8_blocks()),
    "hopper_gemm_bfloat16": lambda: by_gemm_hopper(128, cut(2, 2, 128, 1, 4)),
    "hopper_gemm_wide": lambda: by_gemm_hopper(128, cut(3, 2, 128, 1, 3)),
    "hopper_gemm_float8_channels": lambda: by_gemm_hopper(64, cut(2, 2, 64, 4, 5), float8_channels()),
    "hopper_gemm_float8_blocks": lambda: by_gemm_hopper(128, cut(2, 2, 128, 4, 4), float8_blocks()),
    "hopper_gemm_few": lambda: by_gemm_hopper(16, cut(1, 2, 16, 1, 6, 2), float8_channels()),
    "float32_3": lambda: plain(3, torch.float32),
    "int4_floats": lambda: as_floats(int4),
    "mxfp4_floats": lambda: as_floats(mxfp4),
    "mxfp8_floats": lambda: as_floats(mxfp8),
}
for _tokens in (1, 64):
    for _make in (float8_blocks, float8_channels, int8_channels, mxfp8, mxfp4, int4):
        LAUNCHES[f"{_make.__name__}_{_tokens}"] = lambda _tokens=_tokens, _make=_make: quantized(_tokens, _make)
