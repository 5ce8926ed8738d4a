"""Sums over programs that share outputs, each with some of the inputs, always in the same order. Knows no products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from atom_cluster.platform.store_barrier import barrier_behind_stores


def workspace(splits: int, num_tokens: int, num_out: int, device: torch.device) -> torch.Tensor | None:
    """Where programs leave their parts: [splits, T, O] float32. None when they share nothing."""
    return torch.empty(splits, num_tokens, num_out, dtype=torch.float32, device=device) if splits > 1 else None


@triton.jit
def add_up(part, place, is_inside, partial_ptr, counter_ptr, num_tokens, num_out, SPLITS: tl.constexpr):
    """The sum of all parts and whether this program was the last to bring its own; only then the sum is right.

    place: [...] int64, where each element is in one program's part. The third program id tells programs of an output
    apart; the first two tell which counter is theirs, left at zero.
    """
    own = tl.program_id(2).to(tl.int64) * num_tokens * num_out
    tl.store(partial_ptr + own + place, part, is_inside)
    # Every thread's part is stored before one of them counts it.
    barrier_behind_stores()
    counter = counter_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    is_last = before == SPLITS - 1
    total = tl.zeros_like(part)
    if is_last:
        for index in range(SPLITS):
            first = tl.cast(index, tl.int64) * num_tokens * num_out
            total += tl.load(partial_ptr + first + place, is_inside, other=0.0, cache_modifier=".cg")
        tl.store(counter, 0)
    return total, is_last
