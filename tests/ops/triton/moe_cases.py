"""Experts whose weights have random numbers in one of the formats that checkpoints have, for tests of kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from atom_cluster.ops import torch_ref
from atom_cluster.ops.moe import ExpertActivation, ExpertsOp
from atom_cluster.ops.number_formats import NumberFormat
from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight
from atom_cluster.ops.triton import moe

_TYPICAL = {"float8": 60, "int8": 70, "int4": 5, "float4": 3}


def random_weight(
    num_experts: int,
    num_out: int,
    num_in: int,
    *,
    number: NumberFormat,
    rows: int | None = 1,
    columns: int | None = None,
    has_zero: bool = False,
    is_e8m0: bool = False,
    inputs: InputQuantization | None = None,
    float8_dtype: torch.dtype = torch.float8_e4m3fn,
) -> QuantizedWeight:
    """Whose products are about as large as their inputs. rows, columns: that share a scale; None: all."""
    columns = num_in if columns is None else columns
    rows = num_out if rows is None else rows
    blocks = (num_experts, -(-num_out // rows), -(-num_in // columns))
    if number == "float8":
        codes = (torch.randn(num_experts, num_out, num_in) * 60).clamp(-230, 230).to(float8_dtype)
    elif number == "int8":
        codes = torch.randint(-128, 128, (num_experts, num_out, num_in), dtype=torch.int8)
    else:
        codes = torch.randint(0, 256, (num_experts, num_out, num_in // 2), dtype=torch.uint8)
    size = 1 / (_TYPICAL[number] * num_in**0.5)
    scale = size * (0.5 + torch.rand(blocks))
    if is_e8m0:
        scale = (torch.randint(-2, 3, blocks) + 127 + round(math.log2(size))).to(torch.uint8)
    zero = None
    if has_zero:
        zero = torch.randint(0, 17, blocks, dtype=torch.int16) - (0 if number == "int4" else 8)
    is_static = inputs is not None and inputs.is_static
    return QuantizedWeight(
        number=number,
        codes=codes,
        scale=scale,
        block=(rows, columns),
        zero=zero,
        inputs=inputs,
        input_scale=torch.rand(num_experts) * 0.01 + 0.01 if is_static else None,
    )


def _float8(
    group_size: int | None = None, *, is_e8m0: bool = False, max_abs: float | None = None, is_static: bool = False
) -> InputQuantization:
    return InputQuantization(
        number="float8",
        group_size=group_size,
        scale_format="e8m0" if is_e8m0 else "float32",
        max_abs=max_abs,
        is_static=is_static,
    )


MakeWeight = Callable[[int, int, int], QuantizedWeight]
FORMATS: dict[str, MakeWeight] = {
    "float8 blocks": partial(random_weight, number="float8", rows=128, columns=128, inputs=_float8(128)),
    "float8 blocks of e8m0": partial(
        random_weight, number="float8", rows=128, columns=128, is_e8m0=True, inputs=_float8(128, is_e8m0=True)
    ),
    "float8 odd blocks": partial(random_weight, number="float8", rows=48, columns=64, inputs=_float8(64)),
    "float8 per output and token": partial(random_weight, number="float8", inputs=_float8(max_abs=3.0)),
    "float8 static": partial(random_weight, number="float8", rows=None, inputs=_float8(is_static=True)),
    "float8 alone": partial(random_weight, number="float8"),
    "mxfp8": partial(random_weight, number="float8", columns=32, is_e8m0=True, inputs=_float8(32, is_e8m0=True)),
    "mxfp4": partial(random_weight, number="float4", columns=32, is_e8m0=True),
    "mxfp4 and float8": partial(
        random_weight, number="float4", columns=32, is_e8m0=True, inputs=_float8(32, is_e8m0=True)
    ),
    "int4 with zero points": partial(random_weight, number="int4", columns=128, has_zero=True),
    "int4 in groups of 32": partial(random_weight, number="int4", columns=32),
    "int4 per output": partial(random_weight, number="int4"),
    "int8 in groups of 64": partial(random_weight, number="int8", columns=64, has_zero=True),
    "int8 and int8": partial(random_weight, number="int8", inputs=InputQuantization(number="int8")),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes, activation and biases of experts, and how many tokens they get."""

    num_experts: int
    size: int
    expert_size: int
    num_tokens: int
    num_chosen: int
    activation: ExpertActivation = ExpertActivation()
    has_bias: bool = False
    has_addend: bool = False


def error(case: Case, name: str | None, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> float:
    """Of kernels with weights in one of `FORMATS` (None: floats), ||found - expected|| / ||expected||.

    Expected is what the reference computes in float32 from the same inputs, without the addend.
    """
    torch.manual_seed(seed)
    choices = [torch.randperm(case.num_experts + 1)[: case.num_chosen] for _ in range(case.num_tokens)]
    expert, share = torch.stack(choices).to(device), torch.rand(case.num_tokens, case.num_chosen).to(device)
    x = torch.randn(case.num_tokens, case.size).to(device, dtype)
    addend = torch.randn(case.num_tokens, case.size).to(device, dtype) if case.has_addend else None
    sizes = (case.num_experts, 2 * case.expert_size, case.size), (case.num_experts, case.size, case.expert_size)
    biases = [torch.randn(shape[:2]).to(device, dtype) if case.has_bias else None for shape in sizes]
    ops = []
    if name is None:
        stacks = [(torch.randn(shape) * shape[2] ** -0.5).to(device, dtype) for shape in sizes]
        pair = moe.prepare_experts, torch_ref.prepare_experts
    else:
        stacks = [_moved(FORMATS[name](*shape), device) for shape in sizes]
        pair = moe.prepare_quantized_experts, torch_ref.prepare_quantized_experts
    for prepare, of_dtype in zip(pair, (dtype, torch.float32)):
        gate_up_bias, down_bias = (None if bias is None else bias.to(of_dtype) for bias in biases)
        ops.append(
            prepare(
                *stacks,
                gate_up_bias=gate_up_bias,
                down_bias=down_bias,
                activation=case.activation,
                dtype=of_dtype,
            )
        )
    assert isinstance(ops[0], moe.TritonExperts), ops[0].name
    found, expected = _applied(ops[0], x, expert, share, addend), _applied(ops[1], x.float(), expert, share, None)
    assert found.dtype == dtype
    total = expected if addend is None else expected + addend.float()
    return float((found.float() - total).norm() / expected.norm())


def _applied(
    op: ExpertsOp, x: torch.Tensor, expert: torch.Tensor, share: torch.Tensor, addend: torch.Tensor | None
) -> torch.Tensor:
    if x.is_cuda:
        # What is allocated next has no numbers in it.
        del [torch.full((1 << 22,), torch.nan, device=x.device) for _ in range(4)][:]
    with torch.inference_mode():
        return op(x, expert, share, addend_TD=addend)


def _moved(weight: QuantizedWeight, device: str) -> QuantizedWeight:
    tensors = {name: getattr(weight, name) for name in ("codes", "scale", "zero", "input_scale")}
    return replace(weight, **{name: None if t is None else t.to(device) for name, t in tensors.items()})
