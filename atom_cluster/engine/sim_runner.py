"""SimulatedRunner: a StepRunner that computes nothing, takes as long as a model would, and makes up tokens.

With it a whole cluster runs on a laptop. Each token is a pure function of the row's tokens so far, reached through what
the row's KV blocks contain (`sim_memory`): the answer is the same on any replica, in any batch, by any split between
prefill and decode, with any drafts, unless wrong KV was used. It never is an end-of-sequence token, so `max_tokens`
decides lengths; but a row with a grammar gets what fits it, and ends as soon as it may.

Time comes from a clock, which a test replaces to wait for nothing. Knows no model, no torch and no policy.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from atom_cluster.config.simulation import SimulationConfig
from atom_cluster.engine.protocols import RunnerInfo
from atom_cluster.engine.sim_grammar import SimulatedGrammar
from atom_cluster.engine.sim_groups import GroupView, check_nobody_interferes, make_views
from atom_cluster.engine.sim_memory import KvView, SimulatedMemory, mix
from atom_cluster.engine.sim_scores import made_up_logprobs, made_up_score
from atom_cluster.engine.sim_transfer import TRANSPORT, SimulatedTransfers
from atom_cluster.errors import AtomClusterError, ProtocolError
from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, PromptScores, RowStep, SampledTokens, StepPlan, StepResult
from atom_cluster.messages.transfer import KvCommand, KvOffer, Report, TagBlocks
from atom_cluster.structured.compiler import GrammarCompiler
from atom_cluster.structured.held import HeldGrammars
from atom_cluster.structured.masks import MaskFiller

_MAX_PLANS_IN_FLIGHT = 2
_CHOICE = 0xC4CEB9FE1A85EC53
_DRAFT = 0x2545F4914F6CDD1D


class Clock(Protocol):
    """What time it is, and waiting."""

    def now_s(self) -> float:
        """Seconds; never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Return when so much time has passed."""
        ...


class MonotonicClock:
    """Real time."""

    def now_s(self) -> float:
        """Seconds on this process's monotonic clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let the thread sleep."""
        time.sleep(seconds)


@dataclass(slots=True)
class _Row:
    """A request in the batch."""

    view: KvView
    others: list[GroupView]
    """Pages of the cache groups behind the first."""
    num_prompt_tokens: int
    sampling: SamplingParams
    eos_token_ids: frozenset[int]
    drafts: list[int] = field(default_factory=list)
    grammar: SimulatedGrammar | None = None


@dataclass(slots=True)
class _Flight:
    """A plan that was submitted and not collected; its rows take effect at its end, its KV commands before them."""

    plan: StepPlan
    begins_s: float
    ends_s: float
    has_begun: bool = False
    outcome: StepResult | ProtocolError | None = None


class SimulatedRunner:
    """A gang of one rank on a device that does not exist. See `engine.protocols.StepRunner`."""

    def __init__(
        self,
        *,
        simulation: SimulationConfig,
        block_size: int,
        max_num_requests: int,
        max_model_len: int,
        other_groups: tuple[PageGroup, ...] = (),
        max_drafts: int = 0,
        grammars: GrammarCompiler | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Sizes of the device's memory and vocabulary are in `simulation`. grammars: for rows that have one, this
        object's to close; None: no row may. Real time unless a clock is given."""
        self._simulation = simulation
        self._grammars = HeldGrammars(grammars)
        self._mask_filler = MaskFiller()
        self._clock = clock or MonotonicClock()
        self._memory = SimulatedMemory(
            num_blocks=simulation.num_blocks,
            block_size=block_size,
            other_groups=[group.num_pages for group in other_groups],
        )
        self._transfers = SimulatedTransfers(memory=self._memory, bytes_per_s=simulation.kv_bytes_per_s)
        self._rows: dict[int, _Row] = {}
        self._flights: deque[_Flight] = deque()
        self._last_end_s = -math.inf
        self._failure: ProtocolError | None = None
        self._is_closed = False
        self._info = RunnerInfo(
            num_blocks=simulation.num_blocks,
            block_size=block_size,
            max_num_requests=max_num_requests,
            max_model_len=max_model_len,
            vocab_size=simulation.vocab_size,
            other_groups=other_groups,
            max_drafts=max_drafts,
            kv_offers=(KvOffer(TRANSPORT, (self._transfers.descriptor,)),),
            kv_transports=(TRANSPORT,),
            fingerprint_fields={
                "model": "simulated",
                "block_size": str(block_size),
                "vocab_size": str(simulation.vocab_size),
                "groups": ",".join(f"{group.kind} {group.window}" for group in other_groups),
            },
            choices={"runner": "simulated (`simulation` is configured): tokens are made up"},
        )

    @property
    def info(self) -> RunnerInfo:
        """Constant over the runner's life."""
        return self._info

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan behind the one in flight, if any; returns at once."""
        self._check_usable()
        if len(self._flights) >= _MAX_PLANS_IN_FLIGHT:
            raise ProtocolError(f"plan {plan.step_id} is one too many: {_MAX_PLANS_IN_FLIGHT} are in flight")
        begins_s = max(self._clock.now_s(), self._last_end_s)
        self._last_end_s = begins_s + step_seconds(self._simulation, plan)
        self._flights.append(_Flight(plan, begins_s, self._last_end_s))
        self._grammars.execute(plan.grammars)
        # Checksums are of blocks whose step was collected, so they need not wait for the steps in flight.
        self._start_kv((command for command in plan.kv if isinstance(command, TagBlocks)), self._clock.now_s())

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """The oldest result; None if its step does not end within the timeout. Raises ProtocolError for a bad plan."""
        self._check_usable()
        if not self._flights and timeout_s is None:
            raise AtomClusterError("nothing to wait for: no plan is in flight")
        ends_s = self._flights[0].ends_s if self._flights else math.inf
        deadline_s = math.inf if timeout_s is None else self._clock.now_s() + timeout_s
        while (now_s := self._clock.now_s()) < ends_s:
            if now_s >= deadline_s:
                return None
            self._clock.sleep(min(ends_s, deadline_s) - now_s)
        self._advance()
        outcome = self._flights.popleft().outcome
        if isinstance(outcome, ProtocolError):
            self._failure = outcome
            raise outcome
        return outcome

    def poll_kv(self) -> list[Report]:
        """Reports of KV commands and grammars that ended since the last call, whether their plan was collected or not.
        Grammars are compiled in real time."""
        self._check_usable()
        self._advance()
        return [*self._transfers.poll(self._clock.now_s()), *self._grammars.poll()]

    def close(self) -> None:
        """Drop plans in flight and withdraw the memory from peers. Idempotent."""
        self._is_closed = True
        self._flights.clear()
        self._grammars.close()
        self._transfers.close()

    def corrupt(self, block_id: int) -> None:
        """Damage a block's KV, for tests of what notices it."""
        self._memory.corrupt(block_id)

    def _check_usable(self) -> None:
        if self._is_closed:
            raise AtomClusterError("the runner is closed")
        if self._failure is not None:
            raise AtomClusterError(f"the runner failed before: {self._failure}") from self._failure

    # --- executing plans

    def _advance(self) -> None:
        """Let the plans whose end has come take effect, in order, up to the first that fails."""
        now_s = self._clock.now_s()
        for flight in self._flights:
            if flight.begins_s <= now_s and not flight.has_begun:
                flight.has_begun = True
                commands = (command for command in flight.plan.kv if not isinstance(command, TagBlocks))
                self._start_kv(commands, flight.begins_s)
            if flight.ends_s > now_s or isinstance(flight.outcome, ProtocolError):
                return
            if flight.outcome is None:
                try:
                    flight.outcome = self._execute(flight)
                except ProtocolError as exc:
                    flight.outcome = exc

    def _start_kv(self, commands: Iterable[KvCommand], now_s: float) -> None:
        for command in commands:
            self._transfers.execute(command, now_s)

    def _execute(self, flight: _Flight) -> StepResult:
        plan = flight.plan
        for row in plan.freed_rows:
            self._free(row)
        for new in plan.new_rows:
            self._fill(new)
        for step in plan.rows:
            self._prepare(step)
        steps = [self._start_at_newest(step) for step in plan.rows]
        check_nobody_interferes(
            [
                (group, pages.pages_read(step.start), pages.pages_written(step.start, step.start + step.num_tokens))
                for step in steps
                for group, pages in enumerate(self._rows[step.row].others, 1)
            ]
        )
        sampled = [token for step in steps if (token := self._run(step)) is not None]
        return StepResult(
            step_id=plan.step_id,
            sampled=tuple(sampled),
            prompt_scores=tuple(scores for step in steps if (scores := self._score(step)) is not None),
            run_s=flight.ends_s - flight.begins_s,
            execution="simulated",
        )

    def _free(self, row: int) -> None:
        freed = self._rows.pop(row, None)
        if freed is not None:
            self._memory.detach(freed.view)

    def _fill(self, new: NewRow) -> None:
        if not 0 <= new.row < self._info.max_num_requests or new.row in self._rows:
            raise ProtocolError(f"request {new.request_id} got row {new.row}, which is not free")
        view = KvView(list(new.token_ids))
        others = make_views(self._memory, self._info.other_groups, self._info.max_drafts)
        self._memory.attach(view, new.pages[0])
        for pages, page_ids in zip(others, new.pages[1:], strict=True):
            pages.enter(page_ids)
        self._rows[new.row] = _Row(
            view,
            others,
            new.num_prompt_tokens,
            new.sampling,
            frozenset(new.eos_token_ids),
            list(new.drafts),
            None if new.sampling.grammar is None else SimulatedGrammar(new, self._grammars, self._mask_filler),
        )

    def _prepare(self, step: RowStep) -> None:
        """Bring new pages into the row's tables, in which there must be room for the step then."""
        row = self._rows.get(step.row)
        if row is None:
            raise ProtocolError(f"the plan uses row {step.row}, which is empty")
        if step.new_pages:
            self._memory.attach(row.view, step.new_pages[0])
            for pages, page_ids in zip(row.others, step.new_pages[1:], strict=True):
                pages.extend(page_ids)
        end = step.start + step.num_tokens + (max(0, self._info.max_drafts - 1) if step.samples else 0)
        if end > len(row.view.block_ids) * self._info.block_size:
            raise ProtocolError(f"row {step.row} has {len(row.view.block_ids)} blocks for {end} tokens")
        for pages in row.others:
            pages.check_room(end)

    def _start_at_newest(self, step: RowStep) -> RowStep:
        """The step as it is to be run: a row that decodes goes on behind its newest token."""
        if not (step.samples and step.num_tokens == 1 + step.num_drafts):
            return step
        newest = len(self._rows[step.row].view.token_ids) - 1
        if newest > step.start or (newest < step.start and not self._info.max_drafts):
            raise ProtocolError(f"row {step.row} is to start at {step.start}, but its newest token is at {newest}")
        return msgspec.structs.replace(step, start=newest)

    def _run(self, step: RowStep) -> SampledTokens | None:
        row = self._rows[step.row]
        view, end, num_known = row.view, step.start + step.num_tokens, len(row.view.token_ids)
        view.token_ids += row.drafts[: step.num_drafts]
        if end > len(view.token_ids):
            raise ProtocolError(f"row {step.row} has {len(view.token_ids)} tokens, {end} are to be computed")
        self._memory.read(view, step.start)
        for pages in row.others:
            pages.read(view, step.start)
        self._memory.write(view, step.start, step.num_tokens)
        for pages in row.others:
            pages.write(view, step.start, end, step.num_drafts)
        return self._sample(step, row, num_known) if step.samples else None

    def _score(self, step: RowStep) -> PromptScores | None:
        """Scores of the prompt tokens behind those of a step that was run, if they are wanted and there are any."""
        row = self._rows[step.row]
        last = min(step.start + step.num_tokens, row.num_prompt_tokens - 1)
        if row.sampling.prompt_logprobs is None or last <= step.start:
            return None
        num_top, vocab_size = row.sampling.prompt_logprobs, self._info.vocab_size
        scores = tuple(
            made_up_score(row.view.digests[at], row.view.token_ids[at + 1], num_top, vocab_size)
            for at in range(step.start, last)
        )
        return PromptScores(step.row, step.start, scores)

    def _sample(self, step: RowStep, row: _Row, num_known: int) -> SampledTokens:
        """Sample behind the newest token, and behind each draft as long as drafts are right."""
        view, first = row.view, step.start + step.num_tokens - step.num_drafts
        if first != num_known or num_known > self._info.max_model_len:
            raise ProtocolError(f"row {step.row} cannot sample after position {first - 1}")
        token_ids: list[int] = []
        for num_kept in range(step.num_drafts + 1):
            barred = _barred(row, num_known + num_kept)
            token_id = _choose(view.digests[num_known + num_kept - 1], barred, self._info.vocab_size)
            token_ids.append(token_id if row.grammar is None else row.grammar.choose(token_id))
            if num_kept < step.num_drafts and token_ids[-1] != row.drafts[num_kept]:
                break
        for pages in row.others:
            pages.keep(len(token_ids) - 1)
        view.token_ids[num_known:] = token_ids
        row.drafts = self._draft(row)
        num_top = row.sampling.logprobs
        logprobs = [made_up_logprobs(token_id, num_top or 0, self._info.vocab_size) for token_id in token_ids]
        return SampledTokens(
            step.row,
            tuple(token_ids),
            None if num_top is None else tuple(logprobs),
            tuple(row.drafts),
            None if row.grammar is None else row.grammar.error,
        )

    def _draft(self, row: _Row) -> list[int]:
        """What the row will say next, but for some mistakes."""
        tokens = row.view.token_ids
        at, token_id = len(tokens) - 1, tokens[-1]
        digest = row.view.digests[at - 1]
        drafts = []
        for _ in range(self._info.max_drafts):
            digest = mix(digest, mix(digest, at << 32 | token_id))
            at += 1
            token_id = _choose(digest, _barred(row, at), self._info.vocab_size)
            if mix(digest, _DRAFT) >= self._simulation.draft_acceptance * 2.0**64:
                token_id = (token_id + 1) % self._info.vocab_size
            drafts.append(token_id)
        return drafts


def step_seconds(simulation: SimulationConfig, plan: StepPlan) -> float:
    """How long a plan takes. A row that computes one token and samples is a decode, whatever the token was."""
    if not plan.rows:
        return 0.0
    num_decodes = sum(row.samples and row.num_tokens == 1 + row.num_drafts for row in plan.rows)
    num_drafts = sum(row.num_drafts for row in plan.rows)
    return (
        simulation.base_s
        + simulation.per_prefill_token_s * (plan.num_tokens - num_decodes - num_drafts)
        + simulation.per_decode_row_s * num_decodes
        + simulation.per_context_token_s * sum(row.start + row.num_tokens for row in plan.rows)
    )


def _barred(row: _Row, num_known: int) -> frozenset[int]:
    """Tokens not to choose behind so many: those that end the sequence, and those that stop the request before
    `min_tokens`."""
    if num_known - row.num_prompt_tokens < row.sampling.min_tokens:
        return row.eos_token_ids | frozenset(row.sampling.stop_token_ids)
    return row.eos_token_ids


def _choose(digest: int, barred: frozenset[int], vocab_size: int) -> int:
    """A token that follows from the digest, and is barred only if all are."""
    first = mix(mix(digest, _CHOICE), _CHOICE) % vocab_size
    for token_id in range(first, first + min(vocab_size, len(barred) + 1)):
        if token_id % vocab_size not in barred:
            return token_id % vocab_size
    return first
