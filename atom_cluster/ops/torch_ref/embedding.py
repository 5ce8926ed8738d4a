"""Reference lookup of token embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def look_up(
    rows_VD: torch.Tensor,
    token_ids_T: torch.Tensor,
    *,
    dtype: torch.dtype,
    factor: float = 1.0,
    shard: range | None = None,
) -> torch.Tensor:
    """Rows by their ids, zeros for ids outside of the shard."""
    if shard is None:
        found_TD = F.embedding(token_ids_T, rows_VD).to(dtype)
    else:
        is_elsewhere_T = (token_ids_T < shard.start) | (token_ids_T >= shard.stop)
        local_T = (token_ids_T - shard.start).masked_fill(is_elsewhere_T, 0)
        found_TD = F.embedding(local_T, rows_VD).to(dtype).masked_fill(is_elsewhere_T[:, None], 0)
    return found_TD if factor == 1.0 else found_TD * factor
