"""How much device memory the largest step needs beside weights and KV, measured by running one. GPUs only."""

from __future__ import annotations

import torch

from atom_cluster.errors import ConfigError
from atom_cluster.kv_cache.layout import KvLayout
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.models.protocol import CausalLM
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.platform.device import device_memory
from atom_cluster.runner.kv_memory import allocate_kv_memory
from atom_cluster.runner.kv_sizing import left_for_kv, other_groups
from atom_cluster.runner.model_runner import ModelRunner
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.units import GiB, ceil_div


def kv_budget_bytes(
    model: CausalLM,
    groups: ProcessGroups,
    ops: OpTable,
    *,
    block_size: int,
    max_num_requests: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    num_drafts: int,
    memory_fraction: float,
    device: torch.device,
) -> tuple[int, str]:
    """Bytes left for KV on a GPU: its `memory_fraction`, less what is in use now and what the largest step adds.

    And the arithmetic in words. Raises ConfigError when the largest step does not fit.
    """
    lengths = largest_step(
        max_num_requests=max_num_requests, max_model_len=max_model_len, max_num_batched_tokens=max_num_batched_tokens
    )
    plans, num_pages = step_plans(
        lengths, layout=model.kv_layout, block_size=block_size, max_model_len=max_model_len, num_drafts=num_drafts
    )
    torch.cuda.empty_cache()
    memory = device_memory(device)
    in_use_bytes = memory.total_bytes - memory.free_bytes
    allocated_bytes = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    info = RankInfo(
        num_blocks=num_pages[0],
        other_groups=other_groups(model.kv_layout, num_pages),
        max_drafts=num_drafts,
        block_size=block_size,
        max_num_requests=max_num_requests,
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        rank=groups.tensor.rank,
        world_size=groups.tensor.size,
    )
    runner, kv_bytes = trial_runner(model, groups, ops, info, device)
    try:
        for plan in plans:
            runner.run(plan)
    except torch.cuda.OutOfMemoryError as exc:
        raise ConfigError(
            f"a step of {max_num_batched_tokens} tokens does not fit beside the {_gib(in_use_bytes)} that are in use "
            f"already of {_gib(memory.total_bytes)}: lower scheduler.max_num_batched_tokens, or split the model over "
            "more GPUs (parallel.tensor)"
        ) from exc
    step_bytes = torch.cuda.max_memory_allocated(device) - allocated_bytes - kv_bytes
    del runner
    torch.cuda.empty_cache()
    return left_for_kv(
        total_bytes=memory.total_bytes,
        memory_fraction=memory_fraction,
        in_use_bytes=in_use_bytes,
        step_bytes=step_bytes,
        num_step_tokens=max_num_batched_tokens,
    )


def trial_runner(
    model: CausalLM, groups: ProcessGroups, ops: OpTable, info: RankInfo, device: torch.device
) -> tuple[ModelRunner, int]:
    """A runner of steps before the real one, and the bytes of its KV memory. Not to be closed: the gang goes on."""
    num_pages = (info.num_blocks, *(group.num_pages for group in info.other_groups))
    memory = allocate_kv_memory(model.kv_layout, num_pages=num_pages, block_size=info.block_size, device=device)
    return ModelRunner(model=model, groups=groups, memory=memory, ops=ops, info=info, device=device), memory.num_bytes


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GiB:.2f} GiB"


def largest_step(*, max_num_requests: int, max_model_len: int, max_num_batched_tokens: int) -> list[int]:
    """Tokens per row, ascending, of a step that uses all rows and all tokens, with prompts as long as they can be."""
    lengths: list[int] = []
    remaining = max_num_batched_tokens
    while remaining > 0 and len(lengths) < max_num_requests:
        num_rows_after = max_num_requests - len(lengths) - 1
        lengths.append(min(max_model_len, max(1, remaining - num_rows_after)))
        remaining -= lengths[-1]
    return sorted(lengths)


def step_plans(
    lengths: list[int], *, layout: KvLayout, block_size: int, max_model_len: int, num_drafts: int
) -> tuple[list[StepPlan], tuple[int, ...]]:
    """A step of rows with these numbers of tokens, whose prompts are scored; one that verifies drafts; and the pages
    that they need.

    Rows share the pages of states, which may take more memory than there is and whose content does not matter here.
    """
    new_rows = []
    num_blocks = 0
    states = tuple(range(1 + num_drafts))
    has_states = layout.groups[-1].kind == "state"
    num_paged = len(layout.groups) - has_states
    for row, length in enumerate(lengths):
        last_block = num_blocks + ceil_div(min(length + 2 * num_drafts + 1, max_model_len), block_size)
        blocks = tuple(range(num_blocks, last_block))
        new_rows.append(
            NewRow(
                row=row,
                request_id=f"profile-{row}",
                token_ids=(0,) * length,
                num_prompt_tokens=length,
                pages=(blocks,) * num_paged + ((),) * has_states,
                sampling=SamplingParams(seed=0, prompt_logprobs=1),
            )
        )
        num_blocks = last_block
    state_pages = ((),) * num_paged + (states,) if has_states else ()
    first = tuple(RowStep(row, 0, length, samples=True, new_pages=state_pages) for row, length in enumerate(lengths))
    plans = [StepPlan(step_id=0, new_rows=tuple(new_rows), rows=first)]
    if num_drafts:
        verifying = [
            RowStep(row, length, 1 + num_drafts, samples=True, num_drafts=num_drafts)
            for row, length in enumerate(lengths)
            if length + 1 + num_drafts <= max_model_len
        ]
        plans.append(StepPlan(step_id=1, rows=tuple(verifying[: sum(lengths) // (1 + num_drafts)])))
    return plans, (num_blocks,) * num_paged + (len(states),) * has_states
