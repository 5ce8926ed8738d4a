"""Drives a runner as an engine would, in random steps: chunks, decodes, drafts, preemptions, rows and pages reused.

Pages are scattered; those behind windows go to other rows at once, and states move to other pages, so that a read of
the wrong page shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from atom_cluster.messages.grammars import CompileGrammar
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, SampledTokens, StepPlan
from atom_cluster.structured.compiler import GrammarCompiler
from tests.runner.context_model import BLOCK, GREEDY, MAX_MODEL_LEN, ContextModel, make_memory, make_runner

NUM_PAGES = {"full": 60, "window": 40, "state": 40}


@dataclass
class Request:
    """A request, on a row or between two."""

    name: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)
    """Prompt and output."""
    num_computed: int = 0
    num_drafts: int = 0
    num_drafts_kept: int = 0
    pages: list[list[int]] = field(default_factory=list)
    """Per group."""

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]


@dataclass(frozen=True)
class Verified:
    """What became of the drafts of one row in one step."""

    position: int
    """Of the newest token before them."""
    num_drafts: int
    num_kept: int


class RowDriver:
    """Runs requests to their end; see the module's docstring."""

    def __init__(
        self,
        model: ContextModel,
        *,
        max_drafts: int = 0,
        seed: int = 0,
        num_rows: int = 3,
        has_chunks: bool = True,
        grammars: GrammarCompiler | None = None,
        graph_sizes: Sequence[int] = (),
    ) -> None:
        self._groups = model.kv_layout.groups
        self._max_drafts = max_drafts
        self._random = random.Random(seed)
        self._has_chunks = has_chunks
        num_pages = tuple(NUM_PAGES[group.kind] for group in self._groups)
        memory = make_memory(model, num_pages)
        for region in memory.regions:
            region.blocks.fill_(0x47)  # finite in any dtype, and nothing that a model would have written
        self.runner = make_runner(
            model=model,
            num_rows=num_rows,
            memory=memory,
            max_drafts=max_drafts,
            grammars=grammars,
            graph_sizes=graph_sizes,
        )
        self._free = [self._random.sample(range(n), n) for n in num_pages]
        self._rows: list[Request | None] = [None] * num_rows
        self._freed_rows: list[int] = []
        self._step_id = 0
        self.verified: list[Verified] = []
        self.drafts: list[tuple[tuple[int, ...], list[int]]] = []
        """What was drafted behind which tokens."""

    def run(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, *, samplings: Sequence[SamplingParams] = ()
    ) -> list[list[int]]:
        """Output of each prompt: `num_tokens` tokens, or as many as the context holds."""
        requests = [
            Request(str(i), tuple(prompt), samplings[i] if samplings else GREEDY, list(prompt))
            for i, prompt in enumerate(prompts)
        ]
        self._compile(requests)
        waiting = list(requests)
        while waiting or any(self._rows):
            new_rows = self._admit(waiting)
            self._step(new_rows)
            for row, request in enumerate(self._rows):
                if request is None:
                    continue
                if len(request.output) >= num_tokens or len(request.tokens) > MAX_MODEL_LEN:
                    self._leave(row)
                elif self._random.random() < 0.05:
                    waiting.append(self._leave(row))
        limit = MAX_MODEL_LEN + 1
        return [request.tokens[len(request.prompt) : limit][:num_tokens] for request in requests]

    def _compile(self, requests: Sequence[Request]) -> None:
        """Let the runner compile all grammars, each under the number of its request."""
        commands = [
            CompileGrammar(grammar_id=int(request.name), spec=request.sampling.grammar)
            for request in requests
            if request.sampling.grammar is not None
        ]
        self.runner.run(StepPlan(step_id=self._step_id, grammars=tuple(commands)))
        self._step_id += 1
        num_ready = 0
        while num_ready < len(commands):
            num_ready += len(self.runner.poll_kv())

    def _admit(self, waiting: list[Request]) -> list[NewRow]:
        new_rows = []
        empty = [row for row, request in enumerate(self._rows) if request is None]
        while waiting and empty and self._random.random() < 0.7:
            row, request = empty.pop(self._random.randrange(len(empty))), waiting.pop(0)
            request.num_computed = request.num_drafts = 0
            request.pages = [[] for _ in self._groups]
            self._rows[row] = request
            new_rows.append(
                NewRow(
                    row=row,
                    request_id=request.name,
                    token_ids=tuple(request.tokens),
                    num_prompt_tokens=len(request.prompt),
                    pages=((),) * len(self._groups),
                    sampling=request.sampling,
                    grammar_id=None if request.sampling.grammar is None else int(request.name),
                )
            )
        return new_rows

    def _leave(self, row: int) -> Request:
        request = self._rows[row]
        assert request is not None
        for free, pages in zip(self._free, request.pages):
            free[:0] = [page for page in pages if page >= 0]
        self._rows[row] = None
        self._freed_rows.append(row)
        return request

    def _step(self, new_rows: list[NewRow]) -> None:
        steps = []
        released: list[list[int]] = [[] for _ in self._groups]
        for row, request in enumerate(self._rows):
            if request is not None and self._random.random() < 0.8:
                steps.append(self._plan_row(row, request, released))
        steps.sort(key=lambda step: step.num_tokens > 1)
        plan = StepPlan(
            step_id=self._step_id, freed_rows=tuple(self._freed_rows), new_rows=tuple(new_rows), rows=tuple(steps)
        )
        self._step_id += 1
        self._freed_rows = []
        result = self.runner.run(plan)
        for free, pages in zip(self._free, released):
            free[:0] = pages
        sampled = {one.row: one for one in result.sampled}
        assert [one.row for one in result.sampled] == [step.row for step in steps if step.samples]
        for step in steps:
            self._confirm(step, sampled.get(step.row))

    def _plan_row(self, row: int, request: Request, released: list[list[int]]) -> RowStep:
        start, num_known = request.num_computed, len(request.tokens)
        num_drafts = 0
        num_tokens = num_known - start
        if num_tokens == 1:
            num_drafts = self._random.randint(0, min(request.num_drafts, MAX_MODEL_LEN - num_known))
            num_tokens += num_drafts
        elif self._has_chunks and self._random.random() < 0.7:
            num_tokens = self._random.randint(1, num_tokens)
        samples = start + num_tokens >= num_known
        lookahead = max(0, self._max_drafts - 1) if samples else 0
        new_pages = self._grow(request, start + num_tokens + lookahead, released)
        return RowStep(row, start, num_tokens, samples, new_pages, num_drafts)

    def _grow(self, request: Request, end: int, released: list[list[int]]) -> tuple[tuple[int, ...], ...]:
        capacity = -(-(MAX_MODEL_LEN + 1 + self._max_drafts) // BLOCK)
        num_columns = min(-(-end // BLOCK), capacity)
        grown = []
        for group, held, free, old in zip(self._groups, request.pages, self._free, released):
            if group.kind == "state":
                moves = not held or self._random.random() < 0.5
                new = [free.pop() for _ in range(1 + self._max_drafts)] if moves else []
                if moves:
                    old += held
                    held[:] = new
            else:
                new = [free.pop() for _ in range(num_columns - len(held))]
                held += new
            if group.window is not None:
                for column in range(max(0, request.num_computed - group.window + 1) // BLOCK):
                    if held[column] >= 0:
                        free.insert(0, held[column])
                        held[column] = -1
            grown.append(tuple(new))
        return tuple(grown)

    def _confirm(self, step: RowStep, sampled: SampledTokens | None) -> None:
        request = self._rows[step.row]
        assert request is not None
        if sampled is None:
            request.num_computed += step.num_tokens
            return
        num_kept = len(sampled.token_ids) - 1
        assert num_kept <= step.num_drafts
        if step.num_drafts:
            self.verified.append(Verified(step.start, step.num_drafts, num_kept))
        request.num_computed += step.num_tokens - step.num_drafts + num_kept
        request.tokens += sampled.token_ids
        request.num_drafts = len(sampled.drafts)
        assert len(sampled.drafts) == self._max_drafts
        self.drafts.append((tuple(request.tokens), list(sampled.drafts)))
