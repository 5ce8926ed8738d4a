"""Numbers of eight and four bits: what their codes mean, and how to round to them. Knows no layers and no checkpoints.

float8: e4m3, either `float8_e4m3fn` (largest 448) or `float8_e4m3fnuz` (largest 240, of AMD gfx942). float4: e2m1, the
OCP microscaling format. e8m0: a power of two, 2^(code - 127), as a scale. Four-bit codes are stored two to a byte, the
lower index in the lower bits.
"""

from __future__ import annotations

from typing import Literal

import torch

NumberFormat = Literal["float8", "int8", "float4", "int4"]
ScaleFormat = Literal["float32", "e8m0"]

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
FLOAT4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""By code: sign, two bits of exponent, one of mantissa."""
E8M0_BIAS = 127

_FLOAT4_BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoints between magnitudes."""


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> uint8 codes [..., 2 n]"""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes below 16 [..., 2 n] -> uint8 [..., n]"""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def float4_values(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that float4 codes stand for."""
    return torch.tensor(FLOAT4_VALUES, dtype=dtype, device=codes.device)[codes.long()]


def float4_codes(x: torch.Tensor) -> torch.Tensor:
    """The nearest float4 codes, uint8; ties go to the even mantissa, what is too large to the largest."""
    magnitude = x.abs().contiguous()
    boundaries = torch.tensor(_FLOAT4_BOUNDARIES, dtype=magnitude.dtype, device=x.device)
    below, above = (torch.bucketize(magnitude, boundaries, right=is_right) for is_right in (False, True))
    # The two differ at a midpoint only; the even code of the two is the one with an even mantissa.
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * torch.signbit(x)).to(torch.uint8)


def e8m0_values(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The powers of two that e8m0 codes (uint8) stand for."""
    return torch.ldexp(torch.ones_like(codes, dtype=dtype), codes.to(torch.int32) - E8M0_BIAS)


def largest(number: NumberFormat, float8_dtype: torch.dtype = torch.float8_e4m3fn) -> float:
    """The largest magnitude that scales are made for."""
    if number == "float8":
        return float(torch.finfo(float8_dtype).max)
    return {"int8": 127.0, "int4": 7.0, "float4": 6.0}[number]


def scale_for(max_abs: torch.Tensor, limit: float, scale_format: ScaleFormat = "float32") -> torch.Tensor:
    """Scales that bring magnitudes of up to `max_abs` to at most `limit`; 1 where there are only zeros.

    e8m0: powers of two. For float4, up to a sixth above the largest number is left to be rounded down to it, as in the
    kernels of that format.
    """
    if scale_format == "float32":
        return torch.where(max_abs > 0, max_abs / limit, 1.0)
    # max_abs is m * 2^e with m in [0.5, 1): at most 7/8 * 2^e becomes 1.75 times the power of two that `limit` begins
    # with, which is 448 for float8.
    mantissa, exponent = torch.frexp(max_abs)
    limit_exponent = torch.frexp(torch.tensor(limit)).exponent.to(exponent.device)
    shift = exponent - limit_exponent + (mantissa > 0.875).to(exponent.dtype)
    shift = torch.where(max_abs > 0, shift, 0).clamp(-E8M0_BIAS, E8M0_BIAS)
    return torch.ldexp(torch.ones_like(max_abs), shift)


def e8m0_codes(scale: torch.Tensor) -> torch.Tensor:
    """The codes (uint8) of scales that are powers of two."""
    return (torch.frexp(scale).exponent - 1 + E8M0_BIAS).to(torch.uint8)


def to_float8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Nearest float8 numbers; what is too large becomes the largest instead of a NaN."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def rounded(x: torch.Tensor, number: NumberFormat, float8_dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """The nearest numbers of a format, in the dtype of `x`."""
    if number == "float8":
        return to_float8(x, float8_dtype).to(x.dtype)
    if number == "float4":
        return float4_values(float4_codes(x), x.dtype)
    lowest, highest = (-128, 127) if number == "int8" else (-8, 7)
    return x.round().clamp(lowest, highest)


def float8_to_fnuz(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`float8_e4m3fn` numbers and their scale -> `float8_e4m3fnuz` numbers and scale with the same products.

    The same bits mean half as much there, and those of minus zero mean NaN. A scale in uint8 is e8m0.
    """
    bits = codes.view(torch.int8)
    twice = scale + 1 if scale.dtype == torch.uint8 else scale * 2
    return bits.masked_fill(bits == -128, 0).view(torch.float8_e4m3fnuz), twice
