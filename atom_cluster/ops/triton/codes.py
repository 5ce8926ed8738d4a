"""Codes of four and eight bits as our kernels read them, and the floats that they stand for. Knows no products.

Shape suffixes: I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from atom_cluster.ops.triton import runtime

INT4, FLOAT4, EIGHT_BITS = 0, 1, 2
KIND_NAMES = ("int4", "float4", "eight_bits")

_TWO_TO_126 = tl.constexpr(8.507059173023462e37)
"""Between the exponents of float4, where float32 and bfloat16 have theirs, and what these take them for."""


_INT4_LOWER = tl.constexpr(
    "{ .reg .b32 t; and.b32 t, $2, 0x0f0f0f0f;"
    " prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342; }"
)
_INT4_UPPER = tl.constexpr(
    "{ .reg .b32 t; shr.b32 t, $2, 4; and.b32 t, t, 0x0f0f0f0f;"
    " prmt.b32 $0, t, 0x43434343, 0x4140; prmt.b32 $1, t, 0x43434343, 0x4342; }"
)
_FLOAT4_LOWER = tl.constexpr(
    "{ .reg .b32 s, t; shl.b32 s, $2, 4;"
    " prmt.b32 t, s, 0, 0x1404; and.b32 $0, t, 0x80008000; shr.b32 t, t, 6; and.b32 t, t, 0x01c001c0;"
    " or.b32 $0, $0, t;"
    " prmt.b32 t, s, 0, 0x3424; and.b32 $1, t, 0x80008000; shr.b32 t, t, 6; and.b32 t, t, 0x01c001c0;"
    " or.b32 $1, $1, t;"
    " }"
)
_FLOAT4_UPPER = tl.constexpr(
    "{ .reg .b32 t;"
    " prmt.b32 t, $2, 0, 0x1404; and.b32 $0, t, 0x80008000; shr.b32 t, t, 6; and.b32 t, t, 0x01c001c0;"
    " or.b32 $0, $0, t;"
    " prmt.b32 t, $2, 0, 0x3424; and.b32 $1, t, 0x80008000; shr.b32 t, t, 6; and.b32 t, t, 0x01c001c0;"
    " or.b32 $1, $1, t;"
    " }"
)
_FLOAT8 = tl.constexpr(
    "{ .reg .b32 t;"
    " prmt.b32 t, $2, 0, 0x1404; and.b32 $0, t, 0x80008000; shr.b32 t, t, 4; and.b32 t, t, 0x07f007f0;"
    " or.b32 $0, $0, t;"
    " prmt.b32 t, $2, 0, 0x3424; and.b32 $1, t, 0x80008000; shr.b32 t, t, 4; and.b32 t, t, 0x07f007f0;"
    " or.b32 $1, $1, t;"
    " }"
)
_TWO_TO_120 = tl.constexpr(1.329227995784916e36)
"""The same for float8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight [O, I] in the form that these kernels read."""

    kind: int
    """INT4, FLOAT4 or EIGHT_BITS."""
    codes: torch.Tensor
    """Eight bits: [O, I]. Four bits: uint8 [O, I / 2], I padded to whole pairs of runs: byte b of a pair has the codes
    of input b of the first run (lower bits) and of the second (upper bits)."""
    scale_GO: torch.Tensor
    """Any float dtype, or uint8 that holds e8m0."""
    zero_GO: torch.Tensor | None
    """int8 or a float dtype: what is subtracted from codes; from those of int4 less 8."""
    num_in: int
    group_in: int
    """Inputs that share a scale."""
    run: int
    """Inputs that are read, and multiplied, at a time: a power of two."""
    chunk: int
    """Inputs, a power of two, that divide runs and groups; the run if there is one group."""

    @property
    def num_out(self) -> int:
        """Outputs."""
        return len(self.codes)

    @property
    def step(self) -> int:
        """Inputs of a turn: a run, or a pair of them."""
        return self.run if self.kind == EIGHT_BITS else 2 * self.run

    @property
    def group_or_all(self) -> int:
        """Inputs that share a scale; of one group, more than there are."""
        return self.group_in if len(self.scale_GO) > 1 else 1 << 30

    def becomes_bfloat16_in_fours(self, x_dtype: torch.dtype) -> bool:
        """Whether kernels have instructions of NVIDIA for it."""
        is_float8 = self.codes.dtype == torch.float8_e4m3fn
        is_nvidia = not runtime.INTERPRETED and not runtime.is_hip()
        return is_nvidia and x_dtype == torch.bfloat16 and (self.kind != EIGHT_BITS or is_float8)

    @property
    def has_exact_zero(self) -> bool:
        """Whether codes less zero points are whole numbers, which every float dtype holds."""
        return self.zero_GO is None or self.zero_GO.dtype == torch.int8


@triton.jit
def load_scale(scale_ptrs):
    """Scales in float32."""
    scale = tl.load(scale_ptrs)
    if scale.dtype == tl.uint8:
        # Code 0 is 2^-127, below the normal numbers.
        return tl.where(scale == 0, 0x400000, scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return scale.to(tl.float32)


@triton.jit
def bfloat16_numbers(codes, half: tl.constexpr, KIND: tl.constexpr):
    """As `numbers`, four codes at a time in instructions of NVIDIA, which are not found otherwise. No int8.

    Codes go to the middle of bfloat16's bits: of int4, below those of 128; of floats, with their exponents where
    bfloat16 has its own, so that only the difference of the biases is missing.
    """
    INT4_ASM: tl.constexpr = _INT4_LOWER if half == 0 else _INT4_UPPER
    FLOAT4_ASM: tl.constexpr = _FLOAT4_LOWER if half == 0 else _FLOAT4_UPPER
    ASM: tl.constexpr = _FLOAT8 if KIND == 2 else INT4_ASM if KIND == 0 else FLOAT4_ASM
    found = tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    if KIND == 0:
        found = found - 136.0
    elif KIND == 1:
        found = found * _TWO_TO_126
    else:
        found = found * _TWO_TO_120
    return found


@triton.jit
def numbers(codes, half: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What codes stand for, of the lower or upper bits where there are two; int4: less 8."""
    if KIND == 2:
        found = codes.to(DTYPE)
    elif KIND == 0 and tl.bfloat16 == DTYPE:
        # In bfloat16, 0x4300 is 128, and its lowest bit is worth 1.
        found = (((codes >> (4 * half)) & 0xF).to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    elif KIND == 0:
        # In float32, 0x41800000 is 16, and bit 19 is worth 1.
        code = codes.to(tl.int32) << 19 if half == 0 else codes.to(tl.int32) << 15
        found = (((code & 0x780000) | 0x41800000).to(tl.float32, bitcast=True) - 24.0).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        bits = ((codes >> (4 * half)) & 0xF).to(tl.int16)
        found = (((bits & 8) << 12) | ((bits & 7) << 6)).to(tl.bfloat16, bitcast=True) * _TWO_TO_126
    else:
        code = codes.to(tl.int32) << 28 if half == 0 else codes.to(tl.int32) << 24
        # Two bits of exponent and one of mantissa, where float32 has those.
        bits = (code & -0x80000000) | ((code >> 6) & 0x1C00000)
        found = (bits.to(tl.float32, bitcast=True) * _TWO_TO_126).to(DTYPE)
    return found
