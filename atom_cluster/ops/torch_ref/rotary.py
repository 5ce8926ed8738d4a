"""Reference rotary embedding, written out."""

from __future__ import annotations

import torch


def rotary(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    cos_T1P: torch.Tensor,
    sin_T1P: torch.Tensor,
    *,
    is_interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries and keys."""
    rotate = _rotate_interleaved if is_interleaved else _rotate
    return rotate(query_THD, cos_T1P, sin_T1P), rotate(key_TKD, cos_T1P, sin_T1P)


def _rotate(x_THD: torch.Tensor, cos_T1P: torch.Tensor, sin_T1P: torch.Tensor) -> torch.Tensor:
    rotary_dim = cos_T1P.shape[-1]
    rotated, passed = x_THD[..., :rotary_dim], x_THD[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.cat(((rotated * cos_T1P + swapped * sin_T1P).to(x_THD.dtype), passed), dim=-1)


def _rotate_interleaved(x_THD: torch.Tensor, cos_T1P: torch.Tensor, sin_T1P: torch.Tensor) -> torch.Tensor:
    rotary_dim = cos_T1P.shape[-1]
    rotated, passed = x_THD[..., :rotary_dim], x_THD[..., rotary_dim:]
    cos, sin = cos_T1P[..., rotary_dim // 2 :], sin_T1P[..., rotary_dim // 2 :]
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x_THD.dtype), passed), dim=-1)
