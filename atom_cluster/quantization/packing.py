"""Integers of four and eight bits packed into int32, and what the ops take instead. Knows no checkpoints."""

from __future__ import annotations

import torch

from atom_cluster.errors import WeightsError
from atom_cluster.ops.number_formats import NumberFormat


def unpack_int32(packed: torch.Tensor, num_bits: int) -> torch.Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / num_bits], lowest bits first."""
    shifts = torch.arange(0, 32, num_bits, device=packed.device, dtype=torch.int32)
    codes: torch.Tensor = (packed[..., None] >> shifts) & (2**num_bits - 1)
    return codes.to(torch.uint8).flatten(-2)


def codes_from_packed(packed_along_inputs: torch.Tensor, num_bits: int) -> tuple[NumberFormat, torch.Tensor]:
    """int32 [..., out, in / n], lowest bits first -> the ops' number and codes. Of eight bits, 128 is subtracted."""
    codes = packed_along_inputs.contiguous().view(torch.uint8)
    return ("int4", codes) if num_bits == 4 else ("int8", signed(codes))


def signed(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes less 128, as int8."""
    return (codes ^ 0x80).view(torch.int8)


def zero_of(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Zero points, as codes of any integer type -> int16 of the kind that goes with `codes_from_packed`."""
    return codes.to(torch.int16) - (128 if num_bits == 8 else 0)


def shared_index(index: torch.Tensor) -> torch.Tensor:
    """The group of each input, [*stack, projections, in] int32 -> [*stack, in] int64. All projections must agree.

    Raises WeightsError when they do not: they are computed together.
    """
    first = index[..., 0, :]
    if not torch.equal(index, first[..., None, :].expand_as(index)):
        raise WeightsError("projections that are computed together order their inputs (g_idx) differently")
    return first.long()
