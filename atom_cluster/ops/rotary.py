"""Contract of the rotary position embedding. Knows no layers."""

from __future__ import annotations

from typing import Protocol

import torch


class Rotary(Protocol):
    """Rotates query and key heads by their token's angles."""

    def __call__(
        self,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        cos_T1P: torch.Tensor,
        sin_T1P: torch.Tensor,
        *,
        is_interleaved: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate the first P dims of each head, pass the others through. Shapes and dtypes are kept.

        Dim i is paired with dim i + P/2; with `is_interleaved`, dim 2i with dim 2i + 1. `cos_T1P` and `sin_T1P` hold
        the angle of pair i at i and at i + P/2 in either case, and `sin_T1P` is negated in its first half: a head
        rotated by halves is `x * cos + x_with_halves_swapped * sin`. Computed in the dtype of `cos_T1P`. Inputs may be
        strided views; they may be overwritten, the caller uses the results only.
        """
        ...
