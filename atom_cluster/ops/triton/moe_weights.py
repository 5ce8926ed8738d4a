"""One matrix of all experts as kernels see it, in whatever numbers it is stored. Knows no tokens.

Shape suffixes: E experts, N outputs, B blocks of outputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from atom_cluster.ops.quantized import QuantizedWeight
from atom_cluster.ops.triton.runtime import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
SMALLEST_GROUP = 16
"""Inputs that share a scale: a power of two, or a multiple of the inputs that a step takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMatrix:
    """[E, N, inputs]: floats, or codes with scales."""

    kind: str
    """float, or a `NumberFormat`."""
    codes: torch.Tensor
    scale: torch.Tensor | None
    """[E, B, G]"""
    zero: torch.Tensor | None
    """Of the shape and strides of `scale`."""
    rows: int
    """Outputs that share a scale; 0: all of an expert."""
    group: int
    """Inputs that share a scale; 0: all."""
    bias: torch.Tensor | None
    num_in: int

    @property
    def num_experts(self) -> int:
        """On this rank."""
        return len(self.codes)

    @property
    def num_out(self) -> int:
        """Outputs of an expert."""
        return self.codes.shape[1]

    def arguments(self) -> tuple[Any, ...]:
        """Codes, scale, zero, bias, and strides: of an expert and an output in codes; of expert, block and group."""
        strides = (0, 0, 0) if self.scale is None else self.scale.stride()
        # What is not there is not read; kernels get any address.
        others = (self.codes if tensor is None else tensor for tensor in (self.scale, self.zero, self.bias))
        return (self.codes, *others, self.codes.stride(0), self.codes.stride(1), *strides)

    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        scale = self.scale
        return {
            "KIND": self.kind,
            "ROWS": self.rows,
            "GROUP": self.group,
            "HAS_ZERO": self.zero is not None,
            "IS_E8M0": scale is not None and scale.dtype == torch.uint8,
            "HAS_BIAS": self.bias is not None,
        }


def plain_matrix(weight_ENI: torch.Tensor, bias_EN: torch.Tensor | None, dtype: torch.dtype) -> ExpertMatrix:
    """Of floats, converted to `dtype`."""
    return ExpertMatrix(
        kind="float",
        codes=weight_ENI.to(dtype).contiguous(),
        scale=None,
        zero=None,
        rows=0,
        group=0,
        bias=None if bias_EN is None else bias_EN.contiguous(),
        num_in=weight_ENI.shape[2],
    )


def quantized_matrix(weight: QuantizedWeight, bias_EN: torch.Tensor | None) -> ExpertMatrix:
    """Of a weight that `reason_against` has nothing against."""
    rows, columns = weight.block
    return ExpertMatrix(
        kind=weight.number,
        codes=weight.codes.contiguous(),
        scale=weight.scale.contiguous(),
        zero=None if weight.zero is None else weight.zero.contiguous(),
        rows=0 if rows >= weight.num_out else rows,
        group=0 if columns >= weight.num_in else columns,
        bias=None if bias_EN is None else bias_EN.contiguous(),
        num_in=weight.num_in,
    )


def reason_against(weight: QuantizedWeight) -> str | None:
    """Why kernels do not take this weight; None: they do."""
    columns = weight.block[1]
    if weight.input_group is not None:
        return "groups of inputs are not consecutive"
    if columns < weight.num_in and (columns < SMALLEST_GROUP or columns & (columns - 1)):
        return f"{columns} inputs share a scale"
    return None


@triton.jit
def load_codes(row_ptr, first, num_in, KIND: tl.constexpr, BLOCK: tl.constexpr, IS_EVEN: tl.constexpr):
    """Codes of inputs first .. first + BLOCK of the rows at row_ptr [N, 1]: of four bits, bytes. 0 behind the last."""
    if KIND == "int4" or KIND == "float4":
        column = first // 2 + tl.arange(0, BLOCK // 2)[None, :]
        end = num_in // 2
    else:
        column = first + tl.arange(0, BLOCK)[None, :]
        end = num_in
    if IS_EVEN:
        codes = tl.load(row_ptr + column)
    else:
        codes = tl.load(row_ptr + column, column < end, other=0.0)
    return codes


@triton.jit
def widen(codes, DTYPE: tl.constexpr, KIND: tl.constexpr):
    """The numbers that codes stand for, exactly, in DTYPE: those of int4 without their zero point."""
    if KIND == "int4" or KIND == "float4":
        if tl.bfloat16 == DTYPE:
            low, high = _nibbles_to_bfloat16(codes, KIND)
        else:
            low, high = _number(codes & 0xF, KIND).to(DTYPE), _number(codes >> 4, KIND).to(DTYPE)
        numbers = tl.reshape(tl.join(low, high), (codes.shape[0], 2 * codes.shape[1]))
    else:
        numbers = codes.to(tl.float32).to(DTYPE)
    return numbers


@triton.jit
def _number(code, KIND: tl.constexpr):
    """Of one four-bit code in a byte: float32."""
    if KIND == "float4":
        # Sign and three bits where float16 has its sign and the last bits of its exponent: exact, tiny numbers too.
        bits = code.to(tl.uint16)
        half = (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True)
        number = half.to(tl.float32) * 16384.0
    else:
        number = code.to(tl.float32)
    return number


@triton.jit
def _nibbles_to_bfloat16(codes, KIND: tl.constexpr):
    """The numbers of the lower and of the higher codes in bytes; four bytes at a time where inline assembly can be."""
    if not _INTERPRETED and is_cuda():
        # Bytes go where bfloat16 numbers do, two to a register; nibbles become the last bits of 128 + code, or of the
        # exponent and the first one of the mantissa (2^-126 times the number).
        if KIND == "int4":
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b, c, d, k, z;
                mov.b32 k, 0x3F803F80;
                mov.b32 z, 0xC300C300;
                prmt.b32 a, $4, 0, 0x4140;
                prmt.b32 b, $4, 0, 0x4342;
                shr.u32 c, a, 4;
                shr.u32 d, b, 4;
                lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
                lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
                lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
                lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
                fma.rn.bf16x2 $0, a, k, z;
                fma.rn.bf16x2 $1, b, k, z;
                fma.rn.bf16x2 $2, c, k, z;
                fma.rn.bf16x2 $3, d, k, z;
                }""",
                "=r,=r,=r,=r,r",
                [codes],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        else:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 a, b, c, d, e, f, g, h, k, z;
                prmt.b32 a, $4, 0, 0x4140;
                prmt.b32 b, $4, 0, 0x4342;
                shl.b32 c, a, 6;
                shl.b32 d, b, 6;
                shl.b32 e, a, 2;
                shl.b32 f, b, 2;
                and.b32 c, c, 0x01C001C0;
                and.b32 d, d, 0x01C001C0;
                and.b32 e, e, 0x01C001C0;
                and.b32 f, f, 0x01C001C0;
                shl.b32 g, a, 12;
                shl.b32 h, b, 12;
                lop3.b32 c, g, 0x80008000, c, 0xEA;
                lop3.b32 d, h, 0x80008000, d, 0xEA;
                shl.b32 g, a, 8;
                shl.b32 h, b, 8;
                lop3.b32 e, g, 0x80008000, e, 0xEA;
                lop3.b32 f, h, 0x80008000, f, 0xEA;
                mov.b32 k, 0x7E807E80;
                mov.b32 z, 0x80008000;
                fma.rn.bf16x2 $0, c, k, z;
                fma.rn.bf16x2 $1, d, k, z;
                fma.rn.bf16x2 $2, e, k, z;
                fma.rn.bf16x2 $3, f, k, z;
                }""",
                "=r,=r,=r,=r,r",
                [codes],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
    else:
        low, high = _number(codes & 0xF, KIND).to(tl.bfloat16), _number(codes >> 4, KIND).to(tl.bfloat16)
    return low, high


@triton.jit
def scale_value(scale, IS_E8M0: tl.constexpr):
    """Scales as float32."""
    if IS_E8M0:
        exponent = scale.to(tl.int32)
        # 2^-127 is no normal number.
        value = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    else:
        value = scale.to(tl.float32)
    return value


@triton.jit
def load_per_group(ptr, first, num_in, stride_group, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Scales or zero points of inputs first .. first + BLOCK as they are stored, ptr [N, 1] or one address.

    [N, groups]; [N, 1] or one value where the inputs share a group.
    """
    if GROUP == 0:
        found = tl.load(ptr)
    elif GROUP >= BLOCK:
        found = tl.load(ptr + first // GROUP * stride_group)
    else:
        group = first // GROUP + tl.arange(0, BLOCK // GROUP)[None, :]
        found = tl.load(ptr + group * stride_group, group * GROUP < num_in, other=0)
    return found


@triton.jit
def _spread(per_group, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """What groups have, for each input: [N, BLOCK], or what there is if the inputs share a group."""
    if GROUP > 0 and GROUP < BLOCK:
        spread = tl.broadcast_to(per_group[:, :, None], (per_group.shape[0], BLOCK // GROUP, GROUP))
        per_group = tl.reshape(spread, (per_group.shape[0], BLOCK))
    return per_group


@triton.jit
def load_numbers(
    row_ptr,
    scale,
    zero,
    first,
    num_in,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_E8M0: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    """The numbers that codes stand for, DTYPE [N, BLOCK], times their scales if IS_WHOLE.

    scale, zero: of `load_per_group`.
    """
    numbers = widen(load_codes(row_ptr, first, num_in, KIND, BLOCK, IS_EVEN), DTYPE, KIND)
    if HAS_ZERO:
        IS_SMALL: tl.constexpr = KIND == "int4" and zero.dtype == tl.int16
        zero = _spread(zero.to(tl.float32), GROUP, BLOCK)
        # Codes less whole zero points are small whole numbers.
        numbers = numbers - zero.to(DTYPE) if IS_SMALL else (numbers.to(tl.float32) - zero).to(DTYPE)
    elif KIND == "int4":
        numbers = numbers - 8.0
    if IS_WHOLE:
        scale = _spread(scale_value(scale, IS_E8M0), GROUP, BLOCK)
        if IS_E8M0 and tl.float16 != DTYPE:
            # Powers of two lose nothing in bfloat16, which has them all.
            numbers = _multiply(numbers, tl.broadcast_to(scale.to(DTYPE), numbers.shape))
        else:
            numbers = (numbers.to(tl.float32) * scale).to(DTYPE)
    return numbers.to(DTYPE)


@triton.jit
def _multiply(x, y):
    """x * y; of bfloat16 two at a time where inline assembly can be."""
    if x.dtype == tl.bfloat16 and not _INTERPRETED and is_cuda():
        product = tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
            "=r,r,r",
            [x, y],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        product = x * y
    return product


@triton.jit
def final_scale(sums, scale_ptr, KIND: tl.constexpr, GROUP: tl.constexpr, IS_E8M0: tl.constexpr):
    """Sums [N, ...] of numbers whose outputs have one scale each, at scale_ptr [N, 1]."""
    if KIND != "float" and GROUP == 0:
        sums *= scale_value(tl.load(scale_ptr), IS_E8M0)
    return sums


@triton.jit
def activate(gate, up, alpha, limit, IS_OAI: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """See `ops.moe.ExpertActivation`; float32."""
    if HAS_LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if IS_OAI:
        hidden = (up + 1.0) * gate / (1.0 + tl.exp(-gate * alpha))
    else:
        hidden = up * gate / (1.0 + tl.exp(-gate))
    return hidden
