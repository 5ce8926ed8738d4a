"""Runs a scheduler's steps without engine or device: every sampled token is the same number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.request import Request
from atom_cluster.engine.results import append_tokens, confirm_row
from atom_cluster.engine.scheduler import ScheduledStep, Scheduler
from atom_cluster.kv_cache.block_manager import BlockManager
from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.messages.steps import SampledTokens
from atom_cluster.observability.memory import MemoryMetrics
from tests.factories import MAX_MODEL_LEN, make_scheduler
from tests.fakes import VirtualClock

TOKEN = 7


@dataclass
class Loop:
    """A scheduler with `depth` steps in flight."""

    config: SchedulerConfig = field(default_factory=SchedulerConfig)
    num_blocks: int = 64
    num_rows: int = 8
    depth: int = 1
    other_groups: tuple[PageGroup, ...] = ()
    max_drafts: int = 0
    prompt_limit: int | None = None
    num_kept: Callable[[int], int] = lambda num_drafts: num_drafts
    """How many of a row's drafts are right."""
    metrics: MemoryMetrics = field(default_factory=MemoryMetrics)
    clock: VirtualClock = field(default_factory=VirtualClock)
    steps: list[ScheduledStep] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    in_flight: deque[ScheduledStep] = field(default_factory=deque)
    used_rows: set[int] = field(default_factory=set)
    scheduler: Scheduler = field(init=False)
    blocks: BlockManager = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler, self.blocks = make_scheduler(
            self.config,
            num_blocks=self.num_blocks,
            num_rows=self.num_rows,
            other_groups=self.other_groups,
            max_drafts=self.max_drafts,
            metrics=self.metrics,
            clock=self.clock,
        )

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self) -> ScheduledStep:
        """Schedule a step, and take in results until fewer than `depth` are in flight."""
        step = self.scheduler.schedule(prompt_limit=self.prompt_limit)
        self._check(step)
        self.steps.append(step)
        self.in_flight.append(step)
        while self.in_flight and (len(self.in_flight) >= self.depth or not step.rows):
            self._apply(self.in_flight.popleft())
        self.blocks.check_integrity()
        return step

    def run(self, max_steps: int = 2000) -> None:
        """Until everything has finished."""
        for _ in range(max_steps):
            self.step()
            if not (self.scheduler.num_waiting or self.scheduler.num_running or self.in_flight):
                return
        raise AssertionError(f"{self.scheduler.num_waiting} requests wait, {self.scheduler.num_running} run")

    def _check(self, step: ScheduledStep) -> None:
        assert sum(row.num_tokens for row in step.rows) <= self.config.max_num_batched_tokens
        assert [row.num_tokens for row in step.steps] == [row.num_tokens for row in step.rows]
        kinds = [0 if row.num_tokens == 1 else 1 if row.num_drafts else 2 for row in step.steps]
        assert kinds == sorted(kinds), "rows of one token come first, then those with drafts"
        assert len({row.row for row in step.steps}) == len(step.steps), "a row appears at most once"
        assert set(step.freed_rows) <= self.used_rows
        self.used_rows -= set(step.freed_rows)
        new_rows = {row.row for row in step.new_rows}
        assert not new_rows & self.used_rows, "a row is used again only after it was freed"
        self.used_rows |= new_rows
        assert {row.row for row in step.steps} <= self.used_rows
        for scheduled in step.rows:
            request = scheduled.request
            assert request.num_computed <= len(request.tokens) + request.num_sampling
            room = request.num_computed + request.num_unverified + scheduled.samples * max(0, self.max_drafts - 1)
            assert len(request.table.block_ids) * self.blocks.block_size >= room

    def _apply(self, step: ScheduledStep) -> None:
        for row in step.rows:
            request = row.request
            request.num_in_flight -= 1
            request.num_sampling -= row.samples
            if request.is_done:
                continue
            tokens = (TOKEN,) * (1 + self.num_kept(row.num_drafts))
            sampled = SampledTokens(0, tokens, None, (TOKEN,) * self.max_drafts) if row.samples else None
            confirm_row(row, sampled)
            if sampled is not None:
                append_tokens(request, tokens, None, max_model_len=MAX_MODEL_LEN)
            self.blocks.confirm(request.table, request.tokens, request.num_confirmed)
            if request.num_output == request.sampling.max_tokens:
                self.scheduler.remove(request)
                self.blocks.release(request.table)
                self.finished.append(request)


def shape(step: ScheduledStep) -> list[tuple[str, int]]:
    """Who computes how many tokens, in the plan's order."""
    return [(row.request.request_id, row.num_tokens) for row in step.rows]
