"""The steps of `warm_up.py`, run before anything else is, to learn which kernels they launch and compile those side by
side. None of these kernels runs: see `ops/compile_ahead.py`.

Launches compile one kernel after the other, half a minute for Llama-8B. Threads need a fraction of that.
"""

from __future__ import annotations

import time

import torch

from atom_cluster.kv_cache.layout import KvLayout
from atom_cluster.models.protocol import CausalLM
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.collectives import smallest
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.platform.facts import usable_cores
from atom_cluster.runner.profiling import trial_runner
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.runner.warm_up import warm_up_plans

_MOST_THREADS = 8
"""More take turns with the interpreter's lock: 74 kernels take 61 s with one thread, 20 with 4, 15 with 8 or 16."""
_NUM_BLOCKS = 17
"""Rows share them. Neither 1 nor a multiple of 16, for which Triton may compile other kernels."""
_FIRST = 16
"""One of so many steps goes first: if all their kernels are in the cache on disk, those of the others are too, unless
what filled it was cut short or had other limits. Then launches compile what is missing."""


def rehearsal_pages(layout: KvLayout, num_drafts: int) -> tuple[int, ...]:
    """Pages by cache group that `rehearse` needs."""
    return tuple(1 + num_drafts if group.kind == "state" else _NUM_BLOCKS for group in layout.groups)


def rehearse(
    model: CausalLM,
    groups: ProcessGroups,
    ops: OpTable,
    info: RankInfo,
    *,
    max_num_batched_tokens: int,
    device: torch.device,
) -> str:
    """Compile the kernels of all steps before the first request; what came of it. All ranks call this together.

    info: with `rehearsal_pages`. What is forgotten here is compiled when it is launched, as without this. So is all
    where a step does not fit into memory: the profile, which comes next, tells what to do about that.
    """
    assert ops.compile_ahead is not None, "checked by the caller"
    begun_s = time.perf_counter()
    num_threads = max(1, min(_MOST_THREADS, usable_cores() // info.world_size))
    begin_at = info.rank / info.world_size
    num_compiled = 0
    runner, _ = trial_runner(model, groups, ops, info, device)
    for every in (_FIRST, 1):
        plans = warm_up_plans(
            model.kv_layout, info, max_num_batched_tokens=max_num_batched_tokens, decodes=True, every=every
        )
        try:
            with ops.compile_ahead(device, num_threads=num_threads, begin_at=begin_at) as ahead:
                for plan in plans:
                    runner.run(plan)
        except torch.OutOfMemoryError:
            return "compiled when they are launched: a step before the first request does not fit into memory"
        num_compiled += ahead.num_compiled
        if smallest(-ahead.num_compiled, groups.tensor, device) == 0:
            break
    return (
        f"{ahead.num_kernels} looked up, {num_compiled} of them compiled, by {num_threads} threads in "
        f"{time.perf_counter() - begun_s:.1f} s"
    )
