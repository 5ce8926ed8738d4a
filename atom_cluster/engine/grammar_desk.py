"""GrammarDesk: which grammars an engine's ranks are to hold, and which of them are compiled. Knows no rank and no step.

A request with a grammar takes no part in a step in which it would sample until its grammar is compiled on every rank
(`Request.may_sample`); its prompt may be computed up to there. So nobody else waits for a compilation. It begins when
the request arrives, and so is often over before it matters: while a queue is there, or while prefill works.

Requests with the same grammar share it. A few that nobody uses are kept. How many are compiled at a time, and how many
ranks hold, is bounded: a request beyond that stays without a row, and is asked for again by the scheduler. Only one
that holds blocks is served regardless, since others may wait for these.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from atom_cluster.engine.request import EngineGrammar, Request
from atom_cluster.messages.grammars import CompileGrammar, ForgetGrammar, GrammarCommand, GrammarReady
from atom_cluster.observability.metrics import GRAMMAR_WAIT_S, MetricSink

NUM_KEPT = 32
"""Grammars, used or not, up to which unused ones are kept: a large one has some 10 MB on every rank."""
MAX_PENDING = 32
"""Compilations that ranks have been told of and have not finished. Each has one thread for them."""


class GrammarDesk:
    """See the module's docstring. All calls from the engine's thread."""

    def __init__(self, *, num_rows: int, metrics: MetricSink, clock: Callable[[], float]) -> None:
        """num_rows: requests that run at a time."""
        self._max_held = num_rows + NUM_KEPT
        self._metrics = metrics
        self._clock = clock
        self._known: dict[tuple[str, str], EngineGrammar] = {}
        """By kind and text, those used last behind the others."""
        self._held: dict[int, EngineGrammar] = {}
        """By id, those that ranks have been told to compile and not to forget."""
        self._pending: set[int] = set()
        self._ids: Iterator[int] = itertools.count()
        self._commands: list[GrammarCommand] = []

    @property
    def is_waiting(self) -> bool:
        """Whether ranks compile."""
        return bool(self._pending)

    @property
    def has_commands(self) -> bool:
        """Whether there is something to put into the next plan."""
        return bool(self._commands)

    def take_commands(self) -> tuple[GrammarCommand, ...]:
        """What the next plan tells the ranks."""
        commands, self._commands = tuple(self._commands), []
        return commands

    def open(self, request: Request) -> None:
        """A request is there; if it has a grammar, that is compiled now if it can be. The request uses it until
        `Request.end`."""
        spec = request.sampling.grammar
        if spec is None:
            return
        key = (spec.kind, spec.text)
        grammar = self._known.pop(key, None) or EngineGrammar(spec)
        self._known[key] = grammar
        grammar.users.add(request)
        request.grammar = grammar
        self._forget_unused(NUM_KEPT)
        self.begin(request)

    def begin(self, request: Request) -> None:
        """Let ranks compile this request's grammar, if they have not been told and there is room."""
        grammar = request.grammar
        if grammar is None or grammar.grammar_id is not None:
            return
        if not request.table.block_ids and not self._has_room():
            return
        grammar.grammar_id = next(self._ids)
        self._held[grammar.grammar_id] = grammar
        self._pending.add(grammar.grammar_id)
        self._commands.append(CompileGrammar(grammar_id=grammar.grammar_id, spec=grammar.spec))

    def on_ready(self, report: GrammarReady) -> list[Request]:
        """A compilation has ended on all ranks. If it failed, the requests that cannot go on, which are the caller's to
        end."""
        self._pending.discard(report.grammar_id)
        grammar = self._held.get(report.grammar_id)
        if grammar is None:
            return []  # nobody wanted it any more
        if report.error is None:
            grammar.is_ready = True
            self._note_waits(grammar)
            return []
        self._forget(grammar)
        return sorted(grammar.users, key=lambda request: request.rank)

    def _note_waits(self, grammar: EngineGrammar) -> None:
        for request in grammar.users:
            if request.held_out_s is not None:
                self._metrics.observe(GRAMMAR_WAIT_S, self._clock() - request.held_out_s)
                request.held_out_s = None

    def _has_room(self) -> bool:
        if len(self._pending) >= MAX_PENDING:
            # What nobody waits for any more is not to keep others waiting; its reports will come.
            for grammar in [self._held[number] for number in self._pending if number in self._held]:
                if not grammar.users:
                    self._forget(grammar)
            return False
        if len(self._held) >= self._max_held:
            self._forget_unused(0)
        return len(self._held) < self._max_held

    def _forget_unused(self, num_left: int) -> None:
        """Until so many are left, used or not, those first that were not used for longest."""
        if len(self._known) <= num_left:
            return
        for grammar in [grammar for grammar in self._known.values() if not grammar.users]:
            if len(self._known) <= num_left:
                return
            self._forget(grammar)

    def _forget(self, grammar: EngineGrammar) -> None:
        del self._known[grammar.spec.kind, grammar.spec.text]
        if grammar.grammar_id is not None:
            del self._held[grammar.grammar_id]
            self._commands.append(ForgetGrammar(grammar_id=grammar.grammar_id))
