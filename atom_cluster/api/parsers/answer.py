"""Reads one output: reasoning first, if there is any, then content with calls in it. Knows no single format."""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.api.answers.pieces import Piece
from atom_cluster.api.parsers.calls import CallContext, NotACallError, ToolFormat
from atom_cluster.api.parsers.reader import Reader, Script
from atom_cluster.api.parsers.writer import PieceWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """Marks around reasoning."""

    name: str
    opener: str
    closer: str
    can_reopen: bool = False
    """Whether reasoning may begin anywhere in the answer, rather than at its start only."""
    marks: tuple[str, ...] = ()
    """Other texts of the format that may be special tokens."""

    @property
    def all_marks(self) -> tuple[str, ...]:
        """Everything that has to be visible."""
        return (self.opener, self.closer, *self.marks)


class ScriptParser:
    """An `OutputParser` that runs a script."""

    def __init__(self, script: Script[None], reader: Reader, out: PieceWriter) -> None:
        """`script` reads `reader` and writes `out`."""
        self._script: Script[None] | None = script
        self._reader = reader
        self._out = out
        self._run()

    @property
    def in_reasoning(self) -> bool:
        """See `OutputParser`."""
        return self._out.in_reasoning

    @property
    def in_call(self) -> bool:
        """See `OutputParser`."""
        return self._out.in_call

    @property
    def is_complete(self) -> bool:
        """See `OutputParser`."""
        return self._out.is_complete

    def feed(self, text: str) -> list[Piece]:
        """See `OutputParser`."""
        if text:
            self._reader.supply(text)
            self._run()
        return self._out.take()

    def finish(self) -> list[Piece]:
        """See `OutputParser`."""
        self._reader.end()
        self._run()
        self._out.finish()
        return self._out.take()

    def _run(self) -> None:
        if self._script is None or self._out.is_complete:
            return
        try:
            next(self._script)
        except StopIteration:
            self._script = None


def read_answer(
    context: CallContext, *, reasoning: ReasoningFormat | None, tools: ToolFormat | None, opens_in_reasoning: bool
) -> Script[None]:
    """The script of all families but gpt-oss. `opens_in_reasoning`: the prompt has the opener already."""
    reader, out = context.reader, context.out
    space = ""
    mark: str | None = None
    if reasoning is not None:
        if not opens_in_reasoning:
            space = yield from reader.space()
            opens_in_reasoning = (yield from reader.accept(reasoning.opener)) is not None
        if opens_in_reasoning:
            space = ""
            mark = yield from _read_reasoning(context, reasoning, tools)
    openers = tools.openers if tools else ()
    if reasoning is not None and reasoning.can_reopen:
        openers = (*openers, reasoning.opener)
    if mark is None and tools is not None and tools.bare_starts:
        space += yield from reader.space()
        if (yield from reader.peek()) in tools.bare_starts:
            yield from _read_calls(context, tools, "", read_before=space)
            space = ""
    out.text(space)
    while True:
        if tools is not None and mark in tools.openers:
            yield from _read_calls(context, tools, mark, read_before=mark)
        mark = yield from reader.until(openers, out.text)
        if mark is None:
            return
        if reasoning is not None and mark == reasoning.opener:
            mark = yield from _read_reasoning(context, reasoning, tools)


def _read_reasoning(context: CallContext, reasoning: ReasoningFormat, tools: ToolFormat | None) -> Script[str | None]:
    """Reasoning, behind its opener. Returns the opener of a call, if one ended it."""
    reader, out = context.reader, context.out
    out.begin_reasoning()
    space = yield from reader.space()
    if (yield from reader.accept(reasoning.opener)) is None:
        # Some models repeat the opener that the prompt has; others begin with white space of their own.
        out.reasoning(space)
    ends = (reasoning.closer, *(tools.openers if tools and tools.ends_reasoning else ()))
    mark = yield from reader.until(ends, out.reasoning)
    if mark is None:
        return None
    out.end_reasoning()
    return None if mark == reasoning.closer else mark


def _read_calls(context: CallContext, tools: ToolFormat, opener: str, *, read_before: str) -> Script[None]:
    """Calls behind their opener; what turns out to be none is content, from the last thing on that was told."""
    context.reader.record(read_before)
    try:
        yield from tools.read(context, opener)
    except NotACallError:
        text = context.reader.recorded()
        is_cut_off = context.out.in_call and context.reader.is_exhausted
        if context.out.in_call and not is_cut_off:
            context.out.end_call()
        if not is_cut_off:
            context.out.text(text)
    else:
        context.reader.recorded()
