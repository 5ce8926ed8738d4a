"""Rotary embedding for CPUs: three tensor ops per operand."""

from __future__ import annotations

import torch

from atom_cluster.ops.torch_ref.rotary import rotary as rotary_reference


def rotary(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    cos_T1P: torch.Tensor,
    sin_T1P: torch.Tensor,
    *,
    is_interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries and keys. All but whole heads, rotated by halves in the angles' dtype, take the reference."""
    if is_interleaved or query_THD.shape[-1] != cos_T1P.shape[-1] or query_THD.dtype != cos_T1P.dtype:
        return rotary_reference(query_THD, key_TKD, cos_T1P, sin_T1P, is_interleaved=is_interleaved)
    return _rotate(query_THD, cos_T1P, sin_T1P), _rotate(key_TKD, cos_T1P, sin_T1P)


def _rotate(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    # Rolling by half the dims swaps the halves in one pass.
    swapped = torch.roll(x_THD, x_THD.shape[-1] // 2, -1)
    return torch.addcmul(x_THD * cos_T1D, swapped, sin_T1D)
