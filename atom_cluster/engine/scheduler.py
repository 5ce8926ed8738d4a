"""Stop 7 of 14: the next step under the token budget. Next: atom_cluster/kv_cache/block_manager.py.

There is one rule and no phases: a step is a budget of tokens, given first to requests that decode, then to prompts, in
order of priority and arrival, so that each request's computed tokens catch up with those that are known or being
sampled. Chunked prompts, prefix hits, preempted requests and requests that arrive from prefill differ only in how many
tokens are missing. When blocks run out, the request that goes last is preempted: it loses its blocks and is computed
again later. Prompts computed for other engines are not: their blocks are being read. They get all of them at once.
Knows nothing of tensors, of clients or of other engines.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.request import Phase, Request
from atom_cluster.errors import Overloaded
from atom_cluster.kv_cache.block_manager import BlockManager
from atom_cluster.messages.steps import NewRow, RowStep
from atom_cluster.observability.metrics import PREEMPTIONS, MetricSink


@dataclass(slots=True)
class ScheduledRow:
    """One request's part of a step, for when its result comes."""

    request: Request
    residence: int
    num_tokens: int
    end: int
    """Tokens of the request computed once the step has run."""
    samples: bool


@dataclass(slots=True)
class ScheduledStep:
    """What goes into a plan. Empty when there is nothing to compute."""

    freed_rows: tuple[int, ...] = ()
    new_rows: list[NewRow] = field(default_factory=list)
    steps: list[RowStep] = field(default_factory=list)
    rows: list[ScheduledRow] = field(default_factory=list)


class Scheduler:
    """Requests that wait and run on one engine. Not thread-safe."""

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        blocks: BlockManager,
        num_rows: int,
        metrics: MetricSink,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._metrics = metrics
        self._clock = clock
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._free_rows = list(range(min(num_rows, config.max_num_requests)))[::-1]
        self._freed_rows: list[int] = []
        self._last_prompt_step_s = 0.0
        self._budget = 0
        self._step = ScheduledStep()

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a row."""
        return len(self._running)

    def count_waiting_tokens(self) -> int:
        """Prompt tokens still to be computed. Looks at every request."""
        return sum(request.num_uncomputed for request in (*self._waiting, *self._running) if request.is_prefilling)

    def num_blocks_wanted(self, before: Request) -> int:
        """Blocks that waiting requests lack, as far as they are known, of those that go before this one."""
        earlier = (request for request in self._waiting if request.rank < before.rank)
        return sum(self._blocks.blocks_missing(request.table, len(request.tokens)) for request in earlier)

    def check_room(self, *, num_elsewhere: int = 0) -> None:
        """Raise `Overloaded` if no further request may wait, here or in queues that hold `num_elsewhere`."""
        num_waiting = len(self._waiting) + num_elsewhere
        if num_waiting >= self._config.max_waiting_requests:
            raise Overloaded(f"{num_waiting} requests are waiting already", retry_after_s=1.0)

    def add(self, request: Request) -> None:
        """Queue a request, with whatever it has computed and holds."""
        request.phase = Phase.WAITING
        bisect.insort(self._waiting, request, key=lambda other: other.rank)

    def remove(self, request: Request) -> None:
        """Take a request out for good; its row is free for others. Its blocks stay the caller's to release."""
        if request.phase is Phase.WAITING:
            self._waiting.remove(request)
        elif request.phase is Phase.RUNNING:
            self._running.remove(request)
            self._free_row(request)
        request.phase = Phase.DONE

    def note_step_time(self, num_prompt_tokens: int, seconds: float) -> None:
        """Duration of a step, which `delay_factor` refers to."""
        if num_prompt_tokens:
            self._last_prompt_step_s = seconds

    # --- one step

    def schedule(self) -> ScheduledStep:
        """Fill the next step. What it returns must be run, in order of the calls."""
        self._step = ScheduledStep()
        self._budget = self._config.max_num_batched_tokens
        policy = self._config.policy
        if policy == "prefill_first":
            self._advance(is_prefilling=True)
            self._admit()
            if not self._step.rows:
                self._advance(is_prefilling=False)
        else:
            self._advance(is_prefilling=False)
            has_room_for_prompts = policy == "mixed" or not self._step.rows
            if has_room_for_prompts:
                self._advance(is_prefilling=True)
            self._admit(takes_prompts=has_room_for_prompts)
        step = self._step
        step.freed_rows = tuple(self._freed_rows)
        self._freed_rows.clear()
        # Rows of one token first, as the runner wants them; a request that arrived from prefill is one, too.
        step.steps.sort(key=lambda row: row.num_tokens > 1)
        step.rows.sort(key=lambda row: row.num_tokens > 1)
        return step

    def _advance(self, *, is_prefilling: bool) -> None:
        for request in [request for request in self._running if request.is_prefilling == is_prefilling]:
            if request.phase is not Phase.RUNNING:
                continue  # preempted on behalf of one before it
            num_tokens = self._tokens_for(request)
            if num_tokens and self._make_room(request, request.num_computed + num_tokens):
                new_block_ids = self._blocks.extend(request.table, request.num_computed + num_tokens)
                if new_block_ids is None:
                    raise AssertionError(f"the room made for {request.request_id} is gone")
                self._place(request, num_tokens, new_block_ids)

    def _tokens_for(self, request: Request) -> int:
        """Tokens of a request to compute in this step; 0 if it has to wait or has nothing left to sample for."""
        if not request.is_prefilling:
            is_last_on_its_way = request.num_output + request.num_sampling >= (request.sampling.max_tokens or math.inf)
            return 0 if is_last_on_its_way else min(request.num_uncomputed, self._budget)
        wanted = request.num_uncomputed
        if self._config.long_prefill_tokens:
            wanted = min(wanted, self._config.long_prefill_tokens)
        if not self._config.chunked_prefill and wanted > self._budget:
            return 0
        return min(wanted, self._budget)

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Preempt those that go last until the request's blocks fit. False when it had to be preempted itself."""
        missing = self._blocks.blocks_missing(request.table, num_tokens)
        while missing > self._blocks.pool.num_available:
            victim = max(self._victims(), key=lambda victim: victim.rank)
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _victims(self) -> list[Request]:
        """Who may lose blocks in this step: those without a part in it, and those that wait with blocks in hand."""
        scheduled = {id(row.request) for row in self._step.rows}
        running = [request for request in self._running if request.ticket_id is None and id(request) not in scheduled]
        return running + [request for request in self._waiting if request.table.block_ids]

    def _preempt(self, request: Request) -> None:
        # Plans in flight may still write to these blocks. But plans run in order, and reads from other engines begin
        # after the plans before them: whoever gets the blocks next writes later.
        self._blocks.release(request.table)
        request.num_computed = request.num_confirmed = 0
        self._metrics.inc(PREEMPTIONS)
        if request.phase is Phase.RUNNING:
            self._running.remove(request)
            self._free_row(request)
            self.add(request)

    def _free_row(self, request: Request) -> None:
        if request.row is None:
            raise AssertionError(f"{request.request_id} runs without a row")
        self._freed_rows.append(request.row)
        self._free_rows.append(request.row)
        request.row = None

    def _place(self, request: Request, num_tokens: int, new_block_ids: tuple[int, ...]) -> None:
        if request.row is None:
            raise AssertionError(f"{request.request_id} is placed without a row")
        start = request.num_computed
        end = start + num_tokens
        samples = end == len(request.tokens) + request.num_sampling
        new_pages = (new_block_ids,) if new_block_ids else ()
        self._step.steps.append(RowStep(request.row, start, num_tokens, samples, new_pages))
        self._step.rows.append(ScheduledRow(request, request.residence, num_tokens, end, samples))
        request.num_computed = end
        request.num_sampling += samples
        request.num_in_flight += 1
        self._budget -= num_tokens

    # --- admission

    def _admit(self, *, takes_prompts: bool = True) -> None:
        is_blocked = False
        for request in list(self._waiting):
            if not self._free_rows or not self._budget:
                return
            if request.is_prefilling and not takes_prompts:
                continue
            if request.num_sampling or request.num_in_flight:
                continue  # preempted a moment ago; what is in flight still belongs to its last stay
            # In order, but for requests that came from prefill: their blocks come free when they have run.
            if is_blocked and not request.table.block_ids:
                continue
            is_blocked |= self._is_held_back(request) or not self._try_admit(request)

    def _is_held_back(self, request: Request) -> bool:
        if not self._config.delay_factor or not self._running or request.num_computed:
            return False
        oldest_s = min(other.arrived_s for other in self._waiting)
        return self._clock() - oldest_s < self._config.delay_factor * self._last_prompt_step_s

    def _try_admit(self, request: Request) -> bool:
        is_matched = not request.table.block_ids
        if is_matched:
            request.table = self._blocks.match(request.tokens, "running")
            request.num_computed = len(request.table.block_ids) * self._blocks.block_size
            request.num_confirmed = request.num_computed
        num_tokens = self._tokens_for(request)
        # Room for all that is known, so that two long prompts do not each wait for the other's blocks.
        missing = self._blocks.blocks_missing(request.table, len(request.tokens))
        if not self._running:
            self._take_back(missing, on_behalf_of=request)
        if not num_tokens or missing > self._blocks.pool.num_available:
            if is_matched:
                self._blocks.release(request.table)
                request.num_computed = request.num_confirmed = 0
            return False
        num_held = request.num_computed + num_tokens if request.ticket_id is None else request.num_prompt
        if self._blocks.extend(request.table, num_held) is None:
            raise AssertionError("blocks vanished during admission")
        self._enter(request)
        self._place(request, num_tokens, ())
        return True

    def _take_back(self, num_blocks: int, *, on_behalf_of: Request) -> None:
        """While nobody runs, blocks of those that wait behind come free in no other way."""
        for request in reversed(self._waiting):
            if request is on_behalf_of or num_blocks <= self._blocks.pool.num_available:
                return
            if request.table.block_ids:
                self._preempt(request)

    def _enter(self, request: Request) -> None:
        self._waiting.remove(request)
        bisect.insort(self._running, request, key=lambda other: other.rank)
        request.phase = Phase.RUNNING
        request.row = self._free_rows.pop()
        request.residence += 1
        if request.num_cached is None:
            request.num_cached = request.num_computed
        if request.scheduled_s is None:
            request.scheduled_s = self._clock()
        self._step.new_rows.append(
            NewRow(
                row=request.row,
                request_id=request.request_id,
                token_ids=tuple(request.tokens),
                num_prompt_tokens=request.num_prompt,
                pages=(tuple(request.table.block_ids),),
                sampling=request.sampling,
                eos_token_ids=tuple(sorted(request.eos)),
            )
        )
