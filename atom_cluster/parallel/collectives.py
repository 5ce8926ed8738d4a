"""The collectives that layers use. A group of one returns its input. The only callers of torch.distributed's verbs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from atom_cluster.parallel.groups import Group

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""One function under two names: the first is that of newer versions of torch."""

_MIN_OVERLAPPED_ROWS = 4096
_NUM_OVERLAPPED_PARTS = 4


def all_reduce_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum of `x` over the group, on every rank. May overwrite `x`."""
    if group.peers is not None and group.peers.takes(x):
        return group.peers.sum(x)
    if group.handle is not None:
        dist.all_reduce(x, group=group.handle)
    return x


def is_worth_overlapping(num_rows: int, group: Group) -> bool:
    """Whether sums of so many rows take long enough to be sent in parts, each while the next one is computed."""
    return group.handle is not None and group.peers is not None and num_rows >= _MIN_OVERLAPPED_ROWS


def sum_while_computing(compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum of `compute(x)` over the group, where rows of `x` [T, ...] are independent of each other."""
    parts = x.chunk(_NUM_OVERLAPPED_PARTS)
    pending = []
    for part in parts:
        y = compute(part)
        work = dist.all_reduce(y, group=group.handle, async_op=True)
        pending.append((y, work))
    for _, work in pending:
        if work is not None:
            work.wait()
    return torch.cat([y for y, _ in pending])


def smallest(value: int, group: Group, device: torch.device) -> int:
    """The smallest of the ranks' values, on every rank. Waits for the device."""
    if group.handle is None:
        return value
    x = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(x, op=dist.ReduceOp.MIN, group=group.handle)
    return int(x.item())


def all_reduce_max(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Largest `x` of the group, element by element, on every rank. Overwrites `x`."""
    if group.handle is not None:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group.handle)
    return x


def gather_last_dim(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Ranks' `x` ([S, n], equal shapes) joined along the last dimension, on every rank."""
    if group.handle is None:
        return x
    parts = x.new_empty(group.size * x.shape[0], x.shape[1])
    _all_gather(parts, x.contiguous(), group=group.handle)
    return parts.view(group.size, *x.shape).transpose(0, 1).flatten(1)


def exchange_rows(x: torch.Tensor, sent: list[int], received: list[int], group: Group) -> torch.Tensor:
    """Rows of `x`, the first sent[0] of them for rank 0 and so on -> those sent to this rank, rank 0's first.

    received: what each rank has for this one, as it says in `sent`.
    """
    if group.handle is None:
        return x
    rows = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(rows, x.contiguous(), received, sent, group=group.handle)
    return rows
