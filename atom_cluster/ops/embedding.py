"""Contract of the token embedding's lookup in a shard of the vocabulary. Knows no layers."""

from __future__ import annotations

from typing import Protocol

import torch


class LookUp(Protocol):
    """Rows of a matrix by their ids."""

    def __call__(
        self,
        rows_VD: torch.Tensor,
        token_ids_T: torch.Tensor,
        *,
        dtype: torch.dtype,
        factor: float = 1.0,
        shard: range | None = None,
    ) -> torch.Tensor:
        """[T] int64 -> [T, D] in `dtype`, which holds what the rows' dtype does, multiplied by `factor` in it.

        shard: the ids whose rows these are, from the first row; the result is zero for all others. None: all ids.
        """
        ...
