"""Reference rotary embedding, written out."""

from __future__ import annotations

import torch


def rotary(
    query_THD: torch.Tensor, key_TKD: torch.Tensor, cos_T1P: torch.Tensor, sin_T1P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries and keys."""
    return _rotate(query_THD, cos_T1P, sin_T1P), _rotate(key_TKD, cos_T1P, sin_T1P)


def _rotate(x_THD: torch.Tensor, cos_T1P: torch.Tensor, sin_T1P: torch.Tensor) -> torch.Tensor:
    rotary_dim = cos_T1P.shape[-1]
    rotated, passed = x_THD[..., :rotary_dim], x_THD[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.cat(((rotated * cos_T1P + swapped * sin_T1P).to(x_THD.dtype), passed), dim=-1)
