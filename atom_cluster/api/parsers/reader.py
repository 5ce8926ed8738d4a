"""Reads text that arrives in pieces, as if all of it were there: scripts wait where text is missing.

A script is a generator that yields where it needs more text. So a format is written down in the order in which it is
read, and works wherever its text is cut. Each character is looked at a constant number of times: what is searched again
after a cut is shorter than the longest mark. Knows no format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")

Script = Generator[None, None, T]
"""Yields to wait for more text; returns T."""
Sink = Callable[[str], None]
"""Takes text that was read."""

_WHITE_SPACE = re.compile(r"\s*")


class Reader:
    """The text of one output, read from the front. `supply` and `end` are for its owner, the rest for scripts."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._record: list[str] | None = None
        self.has_ended = False
        """Whether no more text comes."""

    def supply(self, text: str) -> None:
        """More text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """No more text."""
        self.has_ended = True

    @property
    def is_exhausted(self) -> bool:
        """Whether all there will ever be was read."""
        return self.has_ended and self._at == len(self._text)

    def record(self, read_before: str = "") -> None:
        """Remember from here on what is read, behind `read_before`; what was remembered is forgotten."""
        self._record = [read_before]

    def recorded(self) -> str:
        """What was read since `record`; nothing is remembered from here on."""
        text = "".join(self._record or ())
        self._record = None
        return text

    def peek(self) -> Script[str]:
        """The next character, which stays; empty at the end."""
        while self._at == len(self._text) and not self.has_ended:
            yield
        return self._text[self._at : self._at + 1]

    def space(self) -> Script[str]:
        """Read white space."""
        found = ""
        while True:
            match = _WHITE_SPACE.match(self._text, self._at)
            assert match is not None
            found += self._read_to(match.end())
            if self._at < len(self._text) or self.has_ended:
                return found
            yield

    def accept(self, *marks: str) -> Script[str | None]:
        """Read whichever of `marks` comes next, the longest of several; None, and nothing is read, if none does."""
        by_length = sorted(marks, key=len, reverse=True)
        while True:
            rest = self._text[self._at : self._at + len(by_length[0])]
            for mark in by_length:
                if rest.startswith(mark):
                    self._read_to(self._at + len(mark))
                    return mark
                if not self.has_ended and mark.startswith(rest):
                    break
            else:
                return None
            yield

    def skip_begun(self, *marks: str) -> None:
        """Read the rest if no more text comes and it is the beginning of a mark: the output was cut off there."""
        rest = self._text[self._at :]
        if self.has_ended and any(mark.startswith(rest) for mark in marks):
            self._read_to(len(self._text))

    def until(self, marks: tuple[str, ...], sink: Sink) -> Script[str | None]:
        """Give `sink` the text up to the first of `marks`, which is read and returned; None: up to the end.

        No mark is the beginning of another. `sink` never gets a part of a mark that is still arriving.
        """
        search = _mark_search(marks)
        while True:
            found = search.find(self._text, self._at)
            if found is not None:
                start, mark = found
                self._give(start, sink)
                self._read_to(start + len(mark))
                return mark
            num_held = 0 if self.has_ended else search.num_begun(self._text, self._at)
            self._give(len(self._text) - num_held, sink)
            if self.has_ended:
                return None
            yield

    def take_until(self, *marks: str) -> Script[tuple[str, str | None]]:
        """The text up to the first of `marks`, and the mark, which is read; None for it at the end."""
        parts: list[str] = []
        mark = yield from self.until(marks, parts.append)
        return "".join(parts), mark

    def scan(self, pattern: re.Pattern[str], sink: Sink) -> Script[str]:
        """Give `sink` the text up to the next match of a pattern of one character, which stays; empty at the end."""
        while True:
            match = pattern.search(self._text, self._at)
            self._give(len(self._text) if match is None else match.start(), sink)
            if match is not None:
                return match.group()
            if self.has_ended:
                return ""
            yield

    def one(self, sink: Sink) -> Script[str]:
        """Give `sink` the next character; empty at the end."""
        char = yield from self.peek()
        self._give(self._at + len(char), sink)
        return char

    def _give(self, end: int, sink: Sink) -> None:
        text = self._read_to(end)
        if text:
            sink(text)

    def _read_to(self, end: int) -> str:
        text = self._text[self._at : end]
        self._at = end
        if self._record is not None and text:
            self._record.append(text)
        return text


class _MarkSearch:
    """Finds the first of some marks in a text, and what might become one at its end."""

    def __init__(self, marks: tuple[str, ...]) -> None:
        self._whole = re.compile("|".join(map(re.escape, marks))) if marks else None
        self._begun = {mark[:length] for mark in marks for length in range(1, len(mark))}
        self._longest = max(map(len, self._begun), default=0)
        self._firsts = re.compile("[" + "".join(re.escape(mark[0]) for mark in marks) + "]") if marks else None

    def find(self, text: str, start: int) -> tuple[int, str] | None:
        match = self._whole.search(text, start) if self._whole else None
        return None if match is None else (match.start(), match.group())

    def num_begun(self, text: str, start: int) -> int:
        """Length of the longest end of the text with which a mark begins."""
        if self._firsts is None:
            return 0
        at = max(start, len(text) - self._longest)
        while (match := self._firsts.search(text, at)) is not None:
            if text[match.start() :] in self._begun:
                return len(text) - match.start()
            at = match.start() + 1
        return 0


@lru_cache(maxsize=256)
def _mark_search(marks: tuple[str, ...]) -> _MarkSearch:
    return _MarkSearch(marks)
