"""GrammarService: whether a grammar is any good, found out off the event loop, before anything is generated.

Engines compile what passed here again, and come to the same end: see `structured/grammar.py`.
"""

from __future__ import annotations

import asyncio

from atom_cluster.api.parsers import harmony
from atom_cluster.api.parsers.dialect import Dialect
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import ConfigError, InvalidRequest, Overloaded
from atom_cluster.messages.requests import GrammarSpec
from atom_cluster.structured.compiler import GrammarCompiler
from atom_cluster.structured.grammar import CompiledGrammar

_MAX_PENDING = 64
_FINAL_CHANNEL = "<|channel|>final<|message|>"
"""What comes before the answer in OpenAI's harmony format."""


class GrammarService:
    """Compiles grammars of requests, a bounded number at a time. All calls from one event loop."""

    def __init__(self, compiler: GrammarCompiler | None, *, timeout_s: float) -> None:
        """compiler: becomes this object's to close; None: no grammar is any good here."""
        self._compiler = compiler
        self._timeout_s = timeout_s
        self._num_pending = 0

    async def check(self, spec: GrammarSpec, *, param: str) -> None:
        """Return once it is compiled. Raises `InvalidRequest` naming `param` for one that cannot be, or not in time;
        `Overloaded` while too many others wait."""
        if self._compiler is None:
            raise InvalidRequest("there is no structured output for this model", param=param)
        if self._num_pending >= _MAX_PENDING:
            raise Overloaded("too many grammars are waiting to be compiled")
        compiled = self._compiler.submit(spec)
        waiter = asyncio.wrap_future(compiled)
        # It is pending until it is compiled, whether somebody still waits for it or not: so the queue is bounded.
        self._num_pending += 1
        waiter.add_done_callback(self._end)
        done, _ = await asyncio.wait((waiter,), timeout=self._timeout_s)
        if not done:
            if compiled.running():
                raise InvalidRequest(f"the grammar takes longer than {self._timeout_s:g} s to compile", param=param)
            raise Overloaded("grammars of other requests are being compiled")
        try:
            waiter.result()
        except InvalidRequest as exc:
            raise InvalidRequest(str(exc), param=param) from exc
        except ConfigError as exc:
            raise InvalidRequest(f"there is no structured output for this model: {exc}", param=param) from exc

    def close(self) -> None:
        """End the compiler. Idempotent."""
        if self._compiler is not None:
            self._compiler.close()

    def _end(self, waiter: asyncio.Future[CompiledGrammar]) -> None:
        self._num_pending -= 1
        if not waiter.cancelled():
            # A failure that nobody waits for any more is none to be logged.
            waiter.exception()


def reasoning_end(dialect: Dialect, prompt_end: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens behind which an answer begins: a grammar applies to it, not to the reasoning before it.

    Empty where the prompt does not make the model reason, or where the end of reasoning is no token of its own: then a
    grammar applies from the first token on, and the model cannot reason.
    """
    reasoning = dialect.reasoning
    if reasoning is None:
        return ()
    if reasoning is harmony.REASONING:
        return tuple(tokenizer.encode(_FINAL_CHANNEL, add_special_tokens=False))
    closer = tokenizer.token_id(reasoning.closer)
    is_open = prompt_end.rstrip().endswith(reasoning.opener)
    return (closer,) if is_open and closer is not None else ()
