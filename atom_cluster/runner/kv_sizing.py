"""How many pages each cache group gets. Numbers only: knows sizes and limits, allocates nothing.

The first group's pages, the blocks, decide how many tokens fit; the others get what the rows that those blocks can
serve need at once, and some more for prefixes that are kept for later requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.errors import ConfigError
from atom_cluster.kv_cache.layout import CacheGroup, KvLayout, PageGroup
from atom_cluster.units import GiB, ceil_div

MIN_BLOCKS = 2
MIN_SPARE_STATES = 16
SPARE_SHARE = 8
"""Kept for cached prefixes: one window page per so many blocks, and states of the same share of the blocks' bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSizing:
    """What decides about numbers of pages."""

    layout: KvLayout
    block_size: int
    max_num_requests: int
    max_num_batched_tokens: int
    num_drafts: int

    def pages(self, num_blocks: int) -> tuple[int, ...]:
        """Pages per group of the layout when the first has `num_blocks`."""
        return tuple(self._group_pages(group, num_blocks) for group in self.layout.groups)

    def num_bytes(self, num_blocks: int) -> int:
        """Bytes that these take on one rank, each group with a spare page."""
        return sum(
            (count + 1) * self.layout.page_bytes(group, self.block_size)
            for group, count in zip(self.layout.groups, self.pages(num_blocks), strict=True)
        )

    def fit(self, budget_bytes: int) -> int:
        """The most blocks that, with the other groups' pages for them, take no more than `budget_bytes`.

        Raises ConfigError when that is too few to run anything, or states would take more than half of it.
        """
        first, last = 0, budget_bytes // self._block_bytes
        self._check_states(budget_bytes, last)
        while first < last:
            middle = (first + last + 1) // 2
            if self.num_bytes(middle) <= budget_bytes:
                first = middle
            else:
                last = middle - 1
        if first < MIN_BLOCKS:
            raise ConfigError(
                f"{budget_bytes / GiB:.3f} GiB are left for the KV cache, less than {MIN_BLOCKS} blocks of "
                f"{self._block_bytes} bytes and what goes with them: raise cache.cpu_cache_gib or memory_fraction, "
                "or lower cache.block_size or scheduler.max_num_batched_tokens"
            )
        return first

    @property
    def _block_bytes(self) -> int:
        return self.layout.page_bytes(self.layout.groups[0], self.block_size)

    def _group_pages(self, group: CacheGroup, num_blocks: int) -> int:
        num_rows = min(self.max_num_requests, num_blocks)  # a request has at least one block
        if group.window is not None:
            # A row's window, and its step of up to two rounds of drafts, wherever they start within a block.
            per_row = ceil_div(group.window - 1 + 2 * self.num_drafts, self.block_size) + 2
            chunks = ceil_div(self.max_num_batched_tokens, self.block_size)
            return min(num_blocks, num_rows * per_row + chunks + num_blocks // SPARE_SHARE)
        if group.kind == "state":
            spare_bytes = num_blocks * self._block_bytes // SPARE_SHARE
            num_spare = max(MIN_SPARE_STATES, spare_bytes // self.layout.page_bytes(group, self.block_size))
            return num_rows * self._states_per_row + num_spare
        return num_blocks

    @property
    def _states_per_row(self) -> int:
        """Those that a step writes, and the one that it reads."""
        return 2 + self.num_drafts

    def _check_states(self, budget_bytes: int, num_blocks: int) -> None:
        """Raise ConfigError if the states of as many rows as `num_blocks` could serve leave too little for blocks."""
        group = self.layout.groups[-1]
        if group.kind != "state":
            return
        state_bytes = self.layout.page_bytes(group, self.block_size)
        num_rows = min(self.max_num_requests, num_blocks)
        needed = num_rows * self._states_per_row + MIN_SPARE_STATES
        if needed * state_bytes <= budget_bytes // 2:
            return
        num_fitting = (budget_bytes // 2 // state_bytes - MIN_SPARE_STATES) // self._states_per_row
        advice = "raise cache.cpu_cache_gib or memory_fraction"
        if num_fitting > 0:
            advice = f"lower scheduler.max_num_requests to {num_fitting}, or {advice}"
        raise ConfigError(
            f"{needed} recurrent states of {state_bytes} bytes for {num_rows} requests would take more than half of "
            f"the {budget_bytes / GiB:.3f} GiB that are left for the KV cache: {advice}"
        )


def left_for_kv(
    *, total_bytes: int, memory_fraction: float, in_use_bytes: int, step_bytes: int, num_step_tokens: int
) -> tuple[int, str]:
    """Bytes left for KV on a GPU: its `memory_fraction`, less what is in use and what the largest step adds.

    And the arithmetic in words. Negative when that is too much already.
    """
    budget_bytes = int(total_bytes * memory_fraction) - in_use_bytes - step_bytes
    return budget_bytes, (
        f"{memory_fraction} of {_gib(total_bytes)}, less {_gib(in_use_bytes)} in use by weights and others, "
        f"less {_gib(step_bytes)} for a step of {num_step_tokens} tokens: {_gib(budget_bytes)}"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GiB:.2f} GiB"


def other_groups(layout: KvLayout, num_pages: tuple[int, ...]) -> tuple[PageGroup, ...]:
    """The groups behind the first, with their pages."""
    return tuple(
        PageGroup(kind=group.kind, window=group.window, num_pages=count)
        for group, count in zip(layout.groups[1:], num_pages[1:], strict=True)
    )


def describe_pages(layout: KvLayout, num_pages: tuple[int, ...]) -> str:
    """For the start-up log: `2048`, or `2048, window 128: 300, state: 40`."""
    parts = [str(num_pages[0])]
    for group in other_groups(layout, num_pages):
        window = "" if group.window is None else f" {group.window}"
        parts.append(f"{group.kind}{window}: {group.num_pages}")
    return ", ".join(parts)
