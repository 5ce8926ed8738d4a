"""HeldGrammars: the grammars that a rank compiles for its engine, which says by id what to hold and for how long.

Compilations go on beside the rank's steps. Knows no requests.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future

from atom_cluster.errors import AtomClusterError, ProtocolError
from atom_cluster.messages.grammars import CompileGrammar, GrammarCommand, GrammarReady
from atom_cluster.messages.steps import NewRow
from atom_cluster.structured.compiler import GrammarCompiler
from atom_cluster.structured.grammar import CompiledGrammar
from atom_cluster.structured.state import GrammarState

_log = logging.getLogger(__name__)


class HeldGrammars:
    """One rank's. All calls but `poll` from one thread."""

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        """compiler: becomes this object's to close. None: no grammar can be compiled, and the reports say so."""
        self._compiler = compiler
        self._compiled: dict[int, Future[CompiledGrammar]] = {}
        self._reports: deque[GrammarReady] = deque()

    def warm_up(self) -> None:
        """Make the vocabulary now."""
        if self._compiler is not None:
            self._compiler.warm_up()

    def execute(self, commands: Iterable[GrammarCommand]) -> None:
        """Begin and forget, in order; waits for nothing."""
        for command in commands:
            if not isinstance(command, CompileGrammar):
                forgotten = self._compiled.pop(command.grammar_id, None)
                if forgotten is not None:
                    forgotten.cancel()
            elif self._compiler is None:
                self._reports.append(GrammarReady(grammar_id=command.grammar_id, error="this runner has no vocabulary"))
            else:
                self._compile(self._compiler, command)

    def begin(self, new: NewRow) -> GrammarState:
        """A row's place in its grammar, behind the output tokens that it came with.

        Raises `ProtocolError` for a grammar that is not compiled: it would have to be waited for.
        """
        spec = new.sampling.grammar
        compiled = None if new.grammar_id is None else self._compiled.get(new.grammar_id)
        if spec is None or compiled is None or not compiled.done():
            raise ProtocolError(f"request {new.request_id} samples before its grammar {new.grammar_id} is compiled")
        state = GrammarState(
            compiled.result(),
            after=spec.after,
            eos_token_ids=new.eos_token_ids,
            stop_token_ids=new.sampling.stop_token_ids,
            min_tokens=new.sampling.min_tokens,
        )
        state.advance(new.token_ids[new.num_prompt_tokens :])
        return state

    def poll(self) -> list[GrammarReady]:
        """Compilations that ended since the last call, in any way. Never blocks; may be called from any one thread."""
        reports = []
        while self._reports:
            reports.append(self._reports.popleft())
        return reports

    def close(self) -> None:
        """End the compiler. Idempotent."""
        self._compiled.clear()
        if self._compiler is not None:
            self._compiler.close()

    def _compile(self, compiler: GrammarCompiler, command: CompileGrammar) -> None:
        grammar_id = command.grammar_id
        compiled = self._compiled[grammar_id] = compiler.submit(command.spec)
        compiled.add_done_callback(lambda done: self._reports.append(_report(grammar_id, done)))


def _report(grammar_id: int, compiled: Future[CompiledGrammar]) -> GrammarReady:
    """What became of a compilation that is over."""
    if compiled.cancelled():
        return GrammarReady(grammar_id=grammar_id, error="it is not wanted any more")
    error = compiled.exception()
    if error is None:
        return GrammarReady(grammar_id=grammar_id)
    if not isinstance(error, AtomClusterError):
        _log.error("grammar %d could not be compiled", grammar_id, exc_info=error)
    return GrammarReady(grammar_id=grammar_id, error=str(error))
