"""What all formats of tool calls share: what they read from and write to, and how a call that is none is given up."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from atom_cluster.api.parsers.reader import Reader, Script
from atom_cluster.api.parsers.values import ToolSchemas
from atom_cluster.api.parsers.writer import PieceWriter

_NAME = re.compile(r"[^\s\"'<>{}\[\]()]{1,256}")


class NotACallError(Exception):
    """What looked like a call is none: its text is content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallContext:
    """One output, seen by the script of a format."""

    reader: Reader
    out: PieceWriter
    schemas: ToolSchemas

    def begin(self, name: str, *, call_id: str | None = None) -> None:
        """The call's name is certain: it is told, and its text is content no more."""
        name = name.strip()
        if not _NAME.fullmatch(name):
            raise NotACallError
        self.out.begin_call(name, call_id=call_id)
        self.settle()

    def settle(self) -> None:
        """What was read so far has been told."""
        self.reader.record()

    def end(self) -> None:
        """The call has all of its arguments."""
        self.out.end_call()
        self.settle()

    def expect(self, *marks: str) -> Script[str]:
        """Read one of `marks`; raises `NotACallError` when something else comes, or nothing."""
        mark = yield from self.reader.accept(*marks)
        if mark is None:
            raise NotACallError
        return mark

    def expect_until(self, *marks: str) -> Script[tuple[str, str]]:
        """Text up to one of `marks`, which is read; raises `NotACallError` when none comes."""
        text, mark = yield from self.reader.take_until(*marks)
        if mark is None:
            raise NotACallError
        return text, mark


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How a family writes tool calls."""

    name: str
    read: Callable[[CallContext, str], Script[None]]
    """Reads calls from behind the opener that it is given. Raises `NotACallError` where the text is none, having told
    nothing of what was read since the last `settle`."""
    openers: tuple[str, ...] = ()
    """Texts with which calls begin, wherever they are in the content."""
    bare_starts: tuple[str, ...] = ()
    """Calls without an opener: characters with which they begin, only where the content does. `read` gets ""."""
    marks: tuple[str, ...] = ()
    """Other texts of the format that may be special tokens in a vocabulary: they have to be visible."""
    ends_reasoning: bool = False
    """Whether a call within reasoning ends it: so where openers are special tokens, which models do not quote."""
    new_call_id: Callable[[], str] | None = None
    """Where a family wants ids of its own form."""

    @property
    def all_marks(self) -> tuple[str, ...]:
        """Everything that has to be visible."""
        return self.openers + self.marks
