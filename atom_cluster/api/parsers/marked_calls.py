"""Tool calls between special tokens: a name, a separator, JSON arguments. DeepSeek V3 to V3.1, Kimi K2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from atom_cluster.api.parsers.calls import CallContext, NotACallError, ToolFormat
from atom_cluster.api.parsers.json_calls import json_text
from atom_cluster.api.parsers.reader import Script


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The special tokens of one family."""

    section_open: str
    section_close: str
    call_open: str
    separator: str
    call_close: str

    def format(self, name: str, read_call: Callable[[CallContext, Marks], Script[str | None]]) -> ToolFormat:
        """The format whose calls are read by `read_call`; that returns the last mark it read, None where the output was
        cut off."""

        def read(context: CallContext, opener: str) -> Script[None]:
            yield from _read_section(context, self, opener, read_call)

        return ToolFormat(
            name=name,
            read=read,
            openers=(self.section_open, self.call_open),
            marks=(self.section_close, self.separator, self.call_close),
            ends_reasoning=True,
        )

    @property
    def ends(self) -> tuple[str, ...]:
        """What arguments end with; models leave the closing mark out now and then."""
        return (self.call_close, self.section_close, self.call_open)


def _read_section(
    context: CallContext, marks: Marks, opener: str, read_call: Callable[[CallContext, Marks], Script[str | None]]
) -> Script[None]:
    is_in_call = opener == marks.call_open
    has_called = False
    while True:
        if not is_in_call:
            yield from context.reader.space()
            mark = yield from context.expect(marks.call_open, *([marks.section_close] if has_called else []))
            if mark == marks.section_close:
                return
        last = yield from read_call(context, marks)
        has_called = True
        if last in (marks.section_close, None):
            return
        is_in_call = last == marks.call_open


def _read_plain_call(context: CallContext, marks: Marks) -> Script[str | None]:
    """`name` separator `{...}`."""
    name, _ = yield from context.expect_until(marks.separator)
    yield from context.reader.space()
    context.begin(name)
    return (yield from _read_arguments(context, marks))


def _read_arguments(context: CallContext, marks: Marks) -> Script[str | None]:
    mark = yield from context.reader.until(marks.ends, context.out.arguments)
    if mark is not None:
        context.end()
    return mark


def _read_kimi_call(context: CallContext, marks: Marks) -> Script[str | None]:
    """The id, which has the name within it, takes the place of the name: `functions.get_weather:0`."""
    call_id, _ = yield from context.expect_until(marks.separator)
    call_id = call_id.strip()
    name = call_id.removeprefix("functions.")
    head, colon, number = name.rpartition(":")
    yield from context.reader.space()
    context.begin(head if colon and number.isdecimal() else name, call_id=call_id)
    return (yield from _read_arguments(context, marks))


def _read_fenced_call(context: CallContext, marks: Marks) -> Script[str | None]:
    """A type, separator, the name, and arguments in a fenced block."""
    reader = context.reader
    yield from context.expect_until(marks.separator)
    name, _ = yield from context.expect_until("\n")
    yield from reader.space()
    yield from reader.accept("```json", "```")
    yield from reader.space()
    if (yield from reader.peek()) != "{":
        raise NotACallError
    context.begin(name)
    if not (yield from json_text(reader, context.out.arguments)):
        return None
    context.end()
    rest, mark = yield from reader.take_until(*marks.ends)
    rest = rest.strip()
    if mark is not None or not "```".startswith(rest):
        context.out.text(rest.removeprefix("```").strip())
    return mark


_DEEPSEEK = Marks(
    section_open="<｜tool▁calls▁begin｜>",
    section_close="<｜tool▁calls▁end｜>",
    call_open="<｜tool▁call▁begin｜>",
    separator="<｜tool▁sep｜>",
    call_close="<｜tool▁call▁end｜>",
)
_KIMI = Marks(
    section_open="<|tool_calls_section_begin|>",
    section_close="<|tool_calls_section_end|>",
    call_open="<|tool_call_begin|>",
    separator="<|tool_call_argument_begin|>",
    call_close="<|tool_call_end|>",
)

DEEPSEEK_V3 = _DEEPSEEK.format("deepseek_v3", _read_fenced_call)
DEEPSEEK_V31 = _DEEPSEEK.format("deepseek_v31", _read_plain_call)
KIMI_K2 = _KIMI.format("kimi_k2", _read_kimi_call)
