"""Reading text that is still arriving."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from atom_cluster.api.parsers.reader import Reader, Script


def run(script: Callable[[Reader], Script[Any]], chunks: list[str]) -> Any:
    """What a script returns when the text arrives so."""
    reader = Reader()
    running = script(reader)
    try:
        next(running)
        for chunk in chunks:
            reader.supply(chunk)
            next(running)
        reader.end()
        next(running)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the script waits for text that never comes")


def until(*marks: str) -> Callable[[Reader], Script[tuple[str, str | None, str]]]:
    def script(reader: Reader) -> Script[tuple[str, str | None, str]]:
        text, mark = yield from reader.take_until(*marks)
        rest: list[str] = []
        yield from reader.until((), rest.append)
        return text, mark, "".join(rest)

    return script


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a<x>b", ("a", "<x>", "b")),
        ("a<<x>", ("a<", "<x>", "")),
        ("a<y<yy>b", ("a<y", "<yy>", "b")),
        ("a<x", ("a<x", None, "")),
        ("", ("", None, "")),
    ],
)
def test_the_first_mark_is_found_wherever_the_text_is_cut(text: str, expected: tuple[str, str | None, str]) -> None:
    for place in range(len(text) + 1):
        assert run(until("<x>", "<yy>"), [text[:place], text[place:]]) == expected
    assert run(until("<x>", "<yy>"), list(text)) == expected


def test_text_is_given_on_as_soon_as_it_cannot_become_a_mark() -> None:
    reader = Reader()
    given: list[str] = []
    script = reader.until(("<tool>",), given.append)
    next(script)
    for chunk in ("ab", "<to", "p", "<", "tool"):
        reader.supply(chunk)
        next(script)
    assert given == ["ab", "<top"]


def test_the_longest_of_several_marks_is_accepted() -> None:
    def script(reader: Reader) -> Script[tuple[str | None, str | None]]:
        first = yield from reader.accept("``", "```", "x")
        return first, (yield from reader.accept("y"))

    assert run(script, ["`", "``", "z"]) == ("```", None)
    assert run(script, ["`", "`", "y"]) == ("``", "y")
    assert run(script, ["`"]) == (None, None)


def test_what_was_read_can_be_taken_back() -> None:
    def script(reader: Reader) -> Script[str]:
        reader.record("<")
        yield from reader.space()
        yield from reader.scan(re.compile("[;]"), lambda text: None)
        return reader.recorded()

    assert run(script, [" ", "\n a", "b", ";c"]) == "< \n ab"


def test_the_work_is_proportional_to_the_text() -> None:
    """The buffer is never longer than what arrived last and what may still become a mark."""
    reader = Reader()
    script = reader.until(("<tool_call>",), lambda text: None)
    next(script)
    longest = 0
    for _ in range(2000):
        reader.supply("<tool_cal")
        next(script)
        longest = max(longest, len(reader._text) - reader._at)
    assert longest < len("<tool_call>")
