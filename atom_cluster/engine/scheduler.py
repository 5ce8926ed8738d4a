"""Stop 7 of 14: the next step under the token budget. Next: atom_cluster/kv_cache/block_manager.py.

There is one rule and no phases: a step is a budget of tokens, given first to requests that decode, then to prompts, in
order of priority and arrival, so that each request's computed tokens catch up with those that are known or being
sampled. Chunked prompts, prefix hits, preempted requests and requests that arrive from prefill differ only in how many
tokens are missing. When blocks run out, the request that goes last is preempted: it loses its blocks and is computed
again later. Prompts computed for other engines are not: their blocks are being read. They get all of them at once.

A request that decodes may bring drafts, which its row verifies in one step with its newest token. How many tokens come
out is known with the result only. Until then the least is counted on, and pages are there for the most, so that the
next step can be planned; but rows with states wait, since what they would read is not known either.

A request whose grammar is not compiled (`grammar_desk`) takes no part that samples, and keeps nobody waiting for it.
Knows nothing of tensors, of clients or of other engines.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.request import Phase, Request
from atom_cluster.errors import Overloaded
from atom_cluster.kv_cache.block_manager import BlockManager, NewPages
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep
from atom_cluster.observability.departures import Departures
from atom_cluster.observability.metrics import PREEMPTIONS, MetricSink


@dataclass(slots=True)
class ScheduledRow:
    """One request's part of a step, for when its result comes."""

    request: Request
    residence: int
    num_tokens: int
    samples: bool
    num_drafts: int = 0
    num_skipped: int = 0
    """Tokens behind these that are in place (`Request.in_place`)."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens, if it is a chunk of more than the newest one; drafts are no prompt."""
        return self.num_tokens if self.num_tokens > 1 and not self.num_drafts else 0


@dataclass(slots=True)
class ScheduledStep:
    """What goes into a plan. Empty when there is nothing to compute."""

    freed_rows: tuple[int, ...] = ()
    new_rows: list[NewRow] = field(default_factory=list)
    steps: list[RowStep] = field(default_factory=list)
    rows: list[ScheduledRow] = field(default_factory=list)
    unprepared: list[Request] = field(default_factory=list)
    """Without a row, as ranks have not been told to compile their grammars."""
    starved: Request | None = None
    """Computed for another engine, and cannot go on: neither a plan in flight nor anybody else will give it pages."""


class _Part(NamedTuple):
    """What one request computes in a step."""

    end: int
    """Tokens computed behind it, not counting drafts."""
    num_drafts: int
    samples: bool
    room: int
    """Positions that pages are needed for."""


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
        max_drafts: int = 0,
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._max_drafts = max_drafts
        self._metrics = metrics
        self._clock = clock
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._free_rows = list(range(min(num_rows, config.max_num_requests)))[::-1]
        self._freed_rows: list[int] = []
        self._last_prompt_step_s = 0.0
        self._budget = self._draft_budget = self._prompt_budget = 0
        self._step = ScheduledStep()
        self._starved: list[Request] = []
        self._has_preempted = False
        self._departures = Departures(clock)

    @property
    def num_rows(self) -> int:
        """Requests that run at a time."""
        return len(self._free_rows) + len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    def waiting_by_reason(self) -> dict[str, int]:
        """The same by why. Looks at every one."""
        return dict(Counter(_why_waiting(request) for request in self._waiting))

    @property
    def num_running(self) -> int:
        """Requests with a row."""
        return len(self._running)

    @property
    def is_decoding(self) -> bool:
        """Whether any request has got as far as its newest token."""
        return any(not request.is_prefilling for request in self._running)

    def count_waiting_tokens(self) -> int:
        """Prompt tokens still to be computed, those in steps under way included. Looks at every request."""
        return sum(request.num_prompt_missing for request in (*self._waiting, *self._running))

    def pages_wanted(self, before: Request) -> tuple[int, ...]:
        """Pages of each group that waiting requests lack, as far as is known, of those that go before this one."""
        wanted = []
        for request in (request for request in self._waiting if request.rank < before.rank):
            room = len(request.tokens) + self._blocks.lookahead
            num_next = min(room, request.num_computed + self._max_chunk)
            wanted.append(self._blocks.missing(request.table, room, num_next=num_next))
        return tuple(sum(counts) for counts in zip(*wanted))

    @property
    def _max_chunk(self) -> int:
        """Most tokens of one request in one step."""
        limit = self._config.max_num_batched_tokens
        return limit if self._blocks.max_chunk is None else min(limit, self._blocks.max_chunk)

    def check_room(self, *, num_elsewhere: int = 0) -> None:
        """Raise `Overloaded` if no further request may wait, here or in queues that hold `num_elsewhere`."""
        num_waiting = len(self._waiting) + num_elsewhere
        if num_waiting >= self._config.max_waiting_requests:
            retry_after_s = self._departures.retry_after_s(num_waiting)
            raise Overloaded(f"{num_waiting} requests are waiting already", retry_after_s=retry_after_s)

    def add(self, request: Request) -> None:
        """Queue a request, with whatever it has computed and holds."""
        request.phase = Phase.WAITING
        request.marks.begin("queue", self._clock())
        bisect.insort(self._waiting, request, key=lambda other: other.rank)

    def remove(self, request: Request) -> None:
        """Take a request out for good; its row is free for others. Its blocks stay the caller's to release."""
        if request.phase is Phase.WAITING:
            self._waiting.remove(request)
        elif request.phase is Phase.RUNNING:
            self._running.remove(request)
            self._free_row(request)
        request.end()
        self._departures.note(is_busy=bool(self._waiting))

    def note_step_time(self, num_prompt_tokens: int, seconds: float) -> None:
        """Duration of a step, which `delay_factor` refers to."""
        if num_prompt_tokens:
            self._last_prompt_step_s = seconds

    # --- one step

    def schedule(self, *, prompt_limit: int | None = None) -> ScheduledStep:
        """Fill the next step. What it returns must be run, in order of the calls.

        `prompt_limit`: most prompt tokens beside rows that decode, where prompts may be computed in chunks.
        """
        self._step = ScheduledStep()
        self._has_preempted = False
        self._budget = self._config.max_num_batched_tokens
        self._draft_budget = self._count_tokens_for_drafts() if self._max_drafts else 0
        self._prompt_budget = self._budget
        policy = self._config.policy
        if prompt_limit is not None and policy == "mixed" and self.is_decoding:
            self._prompt_budget = min(self._budget, prompt_limit)
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
        step.steps.sort(key=_place_in_plan)
        step.rows.sort(key=_place_in_plan)
        step.starved = self._find_starved()
        return step

    def _count_tokens_for_drafts(self) -> int:
        """Tokens of the step that may be drafts: what is left when every row that decodes has one, and of that half
        while prompts are to be computed. Else drafts of the first rows would keep all others waiting."""
        requests = (*self._running, *self._waiting)
        num_decoding = sum(not request.is_prefilling for request in requests)
        num_left = max(0, self._budget - num_decoding)
        return num_left if num_decoding == len(requests) else num_left // 2

    def _find_starved(self) -> Request | None:
        starved, self._starved = self._starved, []
        # What waits for its grammar goes on by itself, too.
        is_moving = self._step.rows or any(request.num_in_flight or not request.may_sample for request in self._running)
        if is_moving or self._blocks.has_pages_elsewhere:
            return None
        return max(starved, key=lambda request: request.rank, default=None)

    def _advance(self, *, is_prefilling: bool) -> None:
        for request in [request for request in self._running if request.is_prefilling == is_prefilling]:
            if request.phase is not Phase.RUNNING:
                continue  # preempted on behalf of one before it
            part = self._part_for(request, is_prefilling=is_prefilling)
            if part is not None:
                new_pages = self._extend(request, part.room)
                if new_pages is not None:
                    self._place(request, part, new_pages)

    def _part_for(self, request: Request, *, is_prefilling: bool) -> _Part | None:
        """A request's part of this step; None if it has to wait, for its turn or its grammar, or has nothing left to
        sample for."""
        num_tokens = self._num_chunk_tokens(request) if is_prefilling else self._num_decode_tokens(request)
        if not num_tokens:
            return None
        end = request.num_computed + num_tokens
        samples = end == len(request.tokens) + request.num_sampling
        if samples and not request.may_sample:
            self._hold_out(request)
            return None
        num_drafts = self._num_drafts_for(request) if samples and not is_prefilling else 0
        furthest = end + request.num_unverified + num_drafts
        return _Part(end, num_drafts, samples, furthest + (self._blocks.lookahead if samples else 0))

    def _hold_out(self, request: Request) -> None:
        """It could go on but for its grammar."""
        if request.held_out_s is None:
            request.held_out_s = self._clock()

    def _num_decode_tokens(self, request: Request) -> int:
        if self._max_drafts and request.num_sampling and self._blocks.has_states:
            return 0  # which state it goes on from is known with the result
        return min(request.num_uncomputed, self._budget) if self._num_left(request) > 0 else 0

    def _num_chunk_tokens(self, request: Request) -> int:
        wanted = min(request.num_uncomputed, self._max_chunk)
        if request.in_place:
            wanted = min(wanted, request.in_place[0].start - request.num_computed)
        if self._config.long_prefill_tokens:
            wanted = min(wanted, self._config.long_prefill_tokens)
        if not self._config.chunked_prefill:
            return wanted if wanted <= self._budget else 0
        start, end = request.num_computed, request.num_computed + min(wanted, self._budget, self._prompt_budget)
        return self._blocks.chunk_end(start, end, len(request.tokens)) - start

    def _num_left(self, request: Request) -> float:
        """Tokens to sample that are not on their way."""
        max_tokens = request.sampling.max_tokens
        return (math.inf if max_tokens is None else max_tokens) - request.num_output - request.num_sampling

    def _num_drafts_for(self, request: Request) -> int:
        """Drafts worth verifying: behind each there must be a token left to sample. That keeps them in the context,
        too, since what is left to sample does."""
        # A step that samples leaves as many drafts as there can be.
        num_drafts = self._max_drafts if request.num_sampling else len(request.drafts)
        return int(max(0, min(num_drafts, self._max_drafts, self._num_left(request) - 1, self._draft_budget)))

    def _extend(self, request: Request, num_tokens: int) -> NewPages | None:
        """Pages for so many tokens, for which those that go last are preempted. None when the request had to be
        preempted itself, or has to wait."""
        while (new_pages := self._blocks.extend(request.table, num_tokens)) is None:
            victim = max(self._victims(), key=lambda victim: victim.rank, default=None)
            if victim is None:
                self._starved.append(request)
                return None
            if victim is request and request.num_in_flight:
                return None  # what is in flight may move its windows on, and so give it pages
            self._preempt(victim, "own_growth" if victim is request else "other_grows")
            if victim is request:
                return None
        return new_pages

    def _victims(self) -> list[Request]:
        """Who may lose blocks in this step: those without a part in it, and those that wait with blocks in hand."""
        scheduled = {id(row.request) for row in self._step.rows}
        running = [request for request in self._running if request.ticket_id is None and id(request) not in scheduled]
        return running + [request for request in self._waiting if request.table.block_ids]

    def _preempt(self, request: Request, cause: str) -> None:
        # Plans in flight may still write to these blocks. But plans run in order, and reads from other engines begin
        # after the plans before them: whoever gets the blocks next writes later.
        self._blocks.release(request.table)
        request.num_computed = request.num_confirmed = request.num_unverified = 0
        request.in_place.clear()
        request.drafts = ()
        self._has_preempted = True
        self._metrics.inc(PREEMPTIONS, cause=cause)
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

    def _place(self, request: Request, part: _Part, new_pages: NewPages) -> None:
        if request.row is None:
            raise AssertionError(f"{request.request_id} is placed without a row")
        self._blocks.plan_checkpoint(request.table, part.end)
        num_tokens = part.end + part.num_drafts - request.num_computed
        start = request.num_computed + request.num_unverified
        self._step.steps.append(RowStep(request.row, start, num_tokens, part.samples, new_pages, part.num_drafts))
        request.num_computed = part.end
        self._step.rows.append(
            ScheduledRow(
                request,
                request.residence,
                num_tokens,
                part.samples,
                part.num_drafts,
                num_skipped=request.skip_in_place(),
            )
        )
        request.num_unverified += part.num_drafts
        request.num_sampling += part.samples
        request.num_in_flight += 1
        self._budget -= num_tokens
        if num_tokens > 1 + part.num_drafts:
            self._prompt_budget -= num_tokens
        self._draft_budget -= part.num_drafts

    # --- admission

    def _admit(self, *, takes_prompts: bool = True) -> None:
        if self._has_preempted:
            return  # pages are short; prompts coming back for a first chunk again and again would keep others waiting
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
            if request.grammar is not None and request.grammar.grammar_id is None:
                self._hold_out(request)
                self._step.unprepared.append(request)
                continue
            has_entered = not self._is_held_back(request) and self._try_admit(request)
            is_blocked |= not has_entered and request.may_sample

    def _is_held_back(self, request: Request) -> bool:
        if not self._config.delay_factor or not self._running or request.num_computed:
            return False
        oldest_s = min(other.arrived_s for other in self._waiting)
        return self._clock() - oldest_s < self._config.delay_factor * self._last_prompt_step_s

    def _try_admit(self, request: Request) -> bool:
        is_matched = not request.table.block_ids
        if is_matched:
            reuses = not request.wants_prompt_scores
            request.table = self._blocks.match(request.tokens, "running", reuses=reuses)
            request.num_computed = len(request.table.block_ids) * self._blocks.block_size
            request.num_confirmed = request.num_computed
        part = self._part_for(request, is_prefilling=request.is_prefilling)
        if part is None or not self._has_room_at_entry(request, part):
            if is_matched:
                self._blocks.release(request.table)
                request.num_computed = request.num_confirmed = 0
            return False
        self._enter(request)
        num_held = part.room if request.ticket_id is None else len(request.tokens) + self._blocks.lookahead
        new_pages = self._blocks.extend(request.table, num_held, num_next=part.room)
        if new_pages is None:
            raise AssertionError(f"the room seen for {request.request_id} is gone")
        self._place(request, part, new_pages)
        return True

    def _has_room_at_entry(self, request: Request, part: _Part) -> bool:
        # Room for all that is known, so that two long prompts do not each wait for the other's blocks.
        num_known = len(request.tokens) + self._blocks.lookahead
        missing = self._blocks.missing(request.table, max(num_known, part.room), num_next=part.room)
        if not self._running:
            self._take_back(missing, on_behalf_of=request)
        return self._blocks.has_room(missing)

    def _take_back(self, missing: Sequence[int], *, on_behalf_of: Request) -> None:
        """While nobody runs, pages of those that wait behind come free in no other way."""
        for request in reversed(self._waiting):
            if request is on_behalf_of or self._blocks.has_room(missing):
                return
            if request.table.block_ids:
                self._preempt(request, "admission")

    def _enter(self, request: Request) -> None:
        self._waiting.remove(request)
        bisect.insort(self._running, request, key=lambda other: other.rank)
        request.phase = Phase.RUNNING
        request.row = self._free_rows.pop()
        request.residence += 1
        if request.num_cached is None:
            request.num_cached = request.num_computed
        now_s = self._clock()
        request.marks.begin(request.span_in_row, now_s)
        if request.scheduled_s is None:
            request.scheduled_s = now_s
        self._step.new_rows.append(
            NewRow(
                row=request.row,
                request_id=request.request_id,
                token_ids=tuple(request.tokens),
                num_prompt_tokens=request.num_prompt,
                pages=request.table.at_entry(),
                sampling=_as_told(request.sampling),
                eos_token_ids=tuple(sorted(request.eos)),
                drafts=request.drafts,
                grammar_id=None if request.grammar is None else request.grammar.grammar_id,
            )
        )


def _as_told(sampling: SamplingParams) -> SamplingParams:
    """What ranks need of it: not the text of its grammar, which may be long and which they have."""
    spec = sampling.grammar
    if spec is None:
        return sampling
    return msgspec.structs.replace(sampling, grammar=msgspec.structs.replace(spec, text=""))


def _why_waiting(request: Request) -> str:
    if request.held_out_s is not None:
        return "grammar"
    if request.residence:
        return "preempted"
    return "kv_arrived" if request.table.block_ids else "new"


def _place_in_plan(row: RowStep | ScheduledRow) -> int:
    """Rows of one token first, as the runner wants them, even if a whole prompt; rows with drafts; chunks."""
    return (row.num_tokens > 1) + (row.num_tokens > 1 and not row.num_drafts)
