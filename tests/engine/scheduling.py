"""Runs a scheduler's steps without engine or device: every sampled token is the same number."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.request import Phase, Request
from atom_cluster.engine.scheduler import ScheduledStep, Scheduler
from atom_cluster.kv_cache.block_manager import BlockManager
from atom_cluster.observability.memory import MemoryMetrics
from tests.factories import make_scheduler
from tests.fakes import VirtualClock

TOKEN = 7


@dataclass
class Loop:
    """A scheduler with `depth` steps in flight."""

    config: SchedulerConfig = field(default_factory=SchedulerConfig)
    num_blocks: int = 64
    num_rows: int = 8
    depth: int = 1
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
            self.config, num_blocks=self.num_blocks, num_rows=self.num_rows, metrics=self.metrics, clock=self.clock
        )

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self) -> ScheduledStep:
        """Schedule a step, and take in results until fewer than `depth` are in flight."""
        step = self.scheduler.schedule()
        self._check(step)
        self.steps.append(step)
        self.in_flight.append(step)
        while self.in_flight and (len(self.in_flight) >= self.depth or not step.rows):
            self._apply(self.in_flight.popleft())
        self.blocks.pool.check_integrity()
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
        is_chunk = [row.num_tokens > 1 for row in step.steps]
        assert is_chunk == sorted(is_chunk), "rows of one token come first"
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
            assert len(request.table.block_ids) * self.blocks.block_size >= request.num_computed

    def _apply(self, step: ScheduledStep) -> None:
        for row in step.rows:
            request = row.request
            request.num_in_flight -= 1
            request.num_sampling -= row.samples
            if request.is_done:
                continue
            if row.residence == request.residence and request.phase is Phase.RUNNING:
                request.num_confirmed = row.end
            request.tokens.extend([TOKEN] * row.samples)
            self.blocks.offer(request.table, request.tokens, request.num_confirmed)
            if request.num_output == request.sampling.max_tokens:
                self.scheduler.remove(request)
                self.blocks.release(request.table)
                self.finished.append(request)


def shape(step: ScheduledStep) -> list[tuple[str, int]]:
    """Who computes how many tokens, in the plan's order."""
    return [(row.request.request_id, row.num_tokens) for row in step.rows]
