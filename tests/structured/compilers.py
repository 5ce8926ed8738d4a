"""A compiler that is as slow as a test wants it to be."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from functools import cache

from atom_cluster.errors import InvalidRequest
from atom_cluster.messages.requests import GrammarSpec
from atom_cluster.structured.compiler import GrammarCompiler
from atom_cluster.structured.grammar import CompiledGrammar, compile_grammar
from tests.structured.vocabularies import word_vocabulary


@cache
def _compile(kind: str, text: str) -> CompiledGrammar | InvalidRequest:
    try:
        return compile_grammar(GrammarSpec(kind=kind, text=text), word_vocabulary())  # type: ignore[arg-type]
    except InvalidRequest as exc:
        return exc


class HeldCompiler(GrammarCompiler):
    """Compiles nothing before it is told to, and then in order."""

    def __init__(self, *, is_open: bool = False) -> None:
        """is_open: compile everything at once from now on."""
        super().__init__(word_vocabulary)
        self.is_open = is_open
        self.num_submitted = 0
        self._waiting: deque[tuple[GrammarSpec, Future[CompiledGrammar]]] = deque()

    def submit(self, spec: GrammarSpec) -> Future[CompiledGrammar]:
        future: Future[CompiledGrammar] = Future()
        self._waiting.append((spec, future))
        self.num_submitted += 1  # last: who has seen it may call `finish`
        if self.is_open:
            self.finish()
        return future

    def finish(self, num_grammars: int = 1_000_000) -> None:
        """Compile so many of those that wait."""
        while self._waiting and num_grammars:
            num_grammars -= 1
            spec, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                compiled = _compile(spec.kind, spec.text)
                if isinstance(compiled, InvalidRequest):
                    future.set_exception(compiled)
                else:
                    future.set_result(compiled)

    def open(self) -> None:
        """Compile everything, now and from now on."""
        self.is_open = True
        self.finish()
