"""A request while an engine works on it: what is known, what is computed, what it holds. Changed by the scheduler,
the engine core and the handoffs only; knows nothing of other requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from atom_cluster.engine.marks import Marks
from atom_cluster.kv_cache.block_manager import BlockTable
from atom_cluster.messages.requests import GrammarSpec, PromptScore, SamplingParams
from atom_cluster.messages.timing import SpanName


class Phase(Enum):
    """Who is to act on a request next."""

    WAITING = "waiting"
    """In the scheduler's queue: new, preempted, fallen back, or arrived from prefill. May hold blocks already."""
    RUNNING = "running"
    """Has a row."""
    REMOTE = "remote"
    """Prefill computes it, or its blocks are on the way."""
    DONE = "done"
    """Answered or given up; only plans in flight may still touch its blocks."""


@dataclass(slots=True, eq=False)
class EngineGrammar:
    """A grammar that requests of one engine share. Changed by `engine.grammar_desk` only, but for its users."""

    spec: GrammarSpec
    """`after` is that of one of the requests."""
    grammar_id: int | None = None
    """What ranks know it by; None: they have not been told."""
    is_ready: bool = False
    """Whether every rank has compiled it."""
    users: set[Request] = field(default_factory=set)
    """Requests that are not over."""


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """Progress rule: the scheduler makes `num_computed` catch up with the tokens known or being sampled."""

    request_id: str
    client: str
    """Who gets the tokens: an id that the outbox understands. For a prefill order, the decode engine."""
    tokens: list[int]
    """Known tokens: prompt, then output."""
    num_prompt: int
    sampling: SamplingParams
    eos: frozenset[int]
    priority: int
    arrived_s: float
    order: int
    """Number of arrival; equal priorities run in this order."""
    ticket_id: str | None = None
    """Set for a prefill order: the request is computed for another engine, and its blocks go there."""
    client_request_id: str = ""
    """What its client calls it, for logs."""
    num_replayed: int = 0
    """Output tokens known when it arrived: an engine that is gone gave them to the client."""

    phase: Phase = Phase.WAITING
    table: BlockTable = field(default_factory=lambda: BlockTable("running"))
    row: int | None = None
    num_computed: int = 0
    """Leading tokens whose KV is in place or being put there by a plan in flight; drafts do not count."""
    num_unverified: int = 0
    """Drafts that plans in flight verify: so many tokens more than `num_computed` may turn out to be computed."""
    in_place: deque[range] = field(default_factory=deque)
    """Positions behind `num_computed` whose KV is here already: only what lies between is to be computed."""
    num_confirmed: int = 0
    """Leading tokens whose KV is in place."""
    num_sampling: int = 0
    """Tokens that plans in flight will add."""
    num_in_flight: int = 0
    """Plans in flight that involve it, discarded ones included."""
    drafts: tuple[int, ...] = ()
    """Tokens drafted behind the known ones, as far as the runner has them, or is told when the request enters a row."""
    residence: int = 0
    """Counts its stays in the batch; results of an earlier stay do not confirm KV."""
    num_cached: int | None = None
    """Prompt tokens found in a prefix cache when it was first scheduled, here or on prefill."""
    prompt_scores: list[PromptScore] = field(default_factory=list)
    """Of its prompt's tokens from the second on, as far as they are computed and not given out."""
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    grammar: EngineGrammar | None = None
    """Of `sampling.grammar`, from the moment that the engine has taken the request."""
    held_out_s: float | None = None
    """Since when it could have gone on but for its grammar; None: it could not, or has it."""
    marks: Marks = field(init=False)
    """Where its time went so far."""

    def __post_init__(self) -> None:
        """It waits from its arrival on."""
        self.marks = Marks(self.arrived_s)

    @property
    def log_fields(self) -> dict[str, str]:
        """What lines about it carry: its client's id and the engines'."""
        return {"request_id": self.client_request_id or self.request_id, "id": self.request_id}

    @property
    def num_output(self) -> int:
        """Output tokens known."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_initial(self) -> int:
        """Tokens known when it arrived: the prompt, and output that is not sent again."""
        return self.num_prompt + self.num_replayed

    @property
    def num_new(self) -> int:
        """Output tokens known since."""
        return self.num_output - self.num_replayed

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is still to be computed, with those being sampled. At least 1 unless it is to end."""
        return len(self.tokens) + self.num_sampling - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """Whether more than the newest token is to be computed."""
        return self.num_computed < len(self.tokens) - 1 or self.num_output == self.num_sampling == 0

    @property
    def span_in_row(self) -> SpanName:
        """What its time is spent on while it has a row."""
        if self.is_prefilling:
            return "prefill"
        return "decode" if self.num_new > 1 else "first_decode"

    @property
    def num_prompt_missing(self) -> int:
        """Tokens to compute before it decodes; those that a plan in flight computes are not there yet."""
        if self.num_confirmed < self.num_initial:
            return len(self.tokens) - self.num_confirmed
        return self.num_uncomputed if self.is_prefilling else 0

    def skip_in_place(self) -> int:
        """Go on behind what is in place from here on; how many tokens that is."""
        if not self.in_place or self.num_computed < self.in_place[0].start:
            return 0
        num_skipped = self.in_place.popleft().stop - self.num_computed
        self.num_computed += num_skipped
        return num_skipped

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether its prompt is to be scored, and its client has not been told. Then every position is computed here:
        a prefix's KV, found in a cache or read from another engine, says nothing of how likely its tokens are."""
        return self.sampling.prompt_logprobs is not None

    def note_prompt_scores(self, start: int, scores: Sequence[PromptScore]) -> None:
        """Scores of the tokens from `start + 1` on. Those known already, from before a preemption, are left alone."""
        if start <= len(self.prompt_scores):
            self.prompt_scores += scores[len(self.prompt_scores) - start :]

    def take_prompt_scores(self) -> tuple[PromptScore | None, ...] | None:
        """All of them, for its client, who gets them once; None if they are not wanted, or not any more."""
        if not self.wants_prompt_scores:
            return None
        if len(self.prompt_scores) != self.num_prompt - 1:
            raise AssertionError(f"{self.request_id}: {len(self.prompt_scores)} scores of {self.num_prompt} tokens")
        scores, self.prompt_scores = self.prompt_scores, []
        self.sampling = msgspec.structs.replace(self.sampling, prompt_logprobs=None)
        return (None, *scores)

    @property
    def may_sample(self) -> bool:
        """Whether every rank has what its samples take: its grammar, if it has one."""
        return self.grammar is None or self.grammar.is_ready

    def end(self) -> None:
        """It has been answered or given up. Its blocks stay the caller's to release."""
        self.phase = Phase.DONE
        if self.grammar is not None:
            self.grammar.users.discard(self)

    @property
    def is_done(self) -> bool:
        """Whether it has been answered or given up."""
        return self.phase is Phase.DONE

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts requests by who goes first."""
        return (self.priority, self.order)
