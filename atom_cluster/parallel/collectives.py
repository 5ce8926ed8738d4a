"""The collectives that layers use. A group of one returns its input. The only callers of torch.distributed's verbs."""

from __future__ import annotations

import torch
import torch.distributed as dist

from atom_cluster.parallel.groups import Group


def all_reduce_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum of `x` over the group, on every rank. Overwrites `x`."""
    if group.handle is not None:
        dist.all_reduce(x, group=group.handle)
    return x


def broadcast_from_first(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Rank 0's `x` on every rank. Overwrites the others' `x`, which has the same shape and dtype."""
    if group.handle is not None:
        dist.broadcast(x, src=0, group=group.handle)
    return x


def smallest(value: int, group: Group, device: torch.device) -> int:
    """The smallest of the ranks' values, on every rank. Waits for the device."""
    if group.handle is None:
        return value
    x = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(x, op=dist.ReduceOp.MIN, group=group.handle)
    return int(x.item())


def gather_last_dim(x: torch.Tensor, group: Group) -> torch.Tensor | None:
    """Ranks' `x` ([..., n], equal shapes) joined along the last dimension on rank 0; None on the others."""
    if group.handle is None:
        return x
    parts = [torch.empty_like(x) for _ in range(group.size)] if group.rank == 0 else None
    dist.gather(x.contiguous(), parts, dst=0, group=group.handle)
    return None if parts is None else torch.cat(parts, dim=-1)
