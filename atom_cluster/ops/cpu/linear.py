"""Linear op for CPUs: half-precision weights, float32 activations and accumulation, through FBGEMM.

A decode step reads every weight once, so its time is the bytes of the weights: half of them take half the time. The
numbers stay those of float32: a weight is packed only when half precision holds it. Any bfloat16 weight below 65504 in
magnitude qualifies, since bfloat16 has fewer mantissa bits: it is exact from 2^-17 up and off by at most 2^-25 (3e-8)
below. Weights that need more, such as those of a float32 checkpoint, are kept in float32.
"""

from __future__ import annotations

import torch

from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.torch_ref.linear import prepare_linear as prepare_plain

MAX_ROUNDING = 2.0**-25
"""Largest difference between a weight and its packed form: half of half precision's smallest step."""

_FBGEMM_ENGINES = ("fbgemm", "x86")
_ROWS_PER_CHECK = 4096


class PackedLinear:
    """Weights in FBGEMM's own layout; the originals are gone."""

    name = "packed float16"

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        bias = None if bias_O is None else bias_O.float()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight_OI.float(), bias)
        self.num_packed_bytes = 2 * weight_OI.numel()

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, in] float32 -> [T, out] float32."""
        y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x_TI, self._packed)
        return y


def prepare_linear(
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    *,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
) -> LinearOp:
    """Packed if it changes nothing, else plain."""
    if dtype == torch.float32 and can_pack() and is_held_by_half(weight_OI):
        return PackedLinear(weight_OI, bias_O)
    return prepare_plain(weight_OI, bias_O, dtype=dtype, out_dtype=out_dtype)


def can_pack() -> bool:
    """Whether this build of torch has FBGEMM (x86 only) and uses it."""
    return torch.backends.quantized.engine in _FBGEMM_ENGINES


def is_held_by_half(weight_OI: torch.Tensor) -> bool:
    """Whether half precision holds every weight to within `MAX_ROUNDING`. Checked in pieces, to need little memory."""
    for rows in torch.split(weight_OI, _ROWS_PER_CHECK):
        wide = rows.float()
        difference = (wide.half().float() - wide).abs_().max()
        if not bool(difference <= MAX_ROUNDING):
            return False
    return True
