"""Tool calls written as a list of Python calls: `[get_weather(city="Paris", days=3), now()]`. Llama 3.2 and 4."""

from __future__ import annotations

import ast
import contextlib
import json
import re

from atom_cluster.api.parsers.calls import CallContext, NotACallError, ToolFormat
from atom_cluster.api.parsers.reader import Reader, Script
from atom_cluster.api.parsers.values import json_text_of
from atom_cluster.api.parsers.writer import ObjectWriter

_NOT_A_NAME = re.compile(r"[^\w.\-]")
_STRUCTURE = re.compile(r"[\"'()\[\]{},]")
_IN_STRING = {'"': re.compile(r'["\\]'), "'": re.compile(r"['\\]")}


def read_pythonic(context: CallContext, opener: str) -> Script[None]:
    """A list of calls; only names of the request's tools tell it from an answer that begins with a bracket."""
    reader = context.reader
    yield from context.expect("[")
    while True:
        yield from reader.space()
        yield from _read_call(context)
        space = yield from reader.space()
        reader.record(space)
        if (yield from context.expect(",", "]")) == "]":
            return


def _read_call(context: CallContext) -> Script[None]:
    name = yield from _read_name(context.reader)
    if name not in context.schemas.names:
        raise NotACallError
    yield from context.expect("(")
    context.begin(name)
    members = ObjectWriter(context.out)
    while True:
        yield from context.reader.space()
        if (yield from context.reader.accept(")")) is not None:
            break
        last = yield from _read_argument(context, members)
        if last == ")":
            break
    members.end()
    context.end()


def _read_argument(context: CallContext, members: ObjectWriter) -> Script[str]:
    """`key=value` and the comma or the bracket behind it, which is returned."""
    try:
        key = yield from _read_name(context.reader)
        yield from context.reader.space()
        yield from context.expect("=")
        if not key:
            raise NotACallError
        value, last = yield from _read_value(context.reader)
    except NotACallError:
        if not context.reader.is_exhausted:
            members.end()
        raise
    members.key(key)
    members.value(_as_json(value.strip()))
    context.settle()
    return last


def _read_name(reader: Reader) -> Script[str]:
    parts: list[str] = []
    yield from reader.scan(_NOT_A_NAME, parts.append)
    return "".join(parts)


def _read_value(reader: Reader) -> Script[tuple[str, str]]:
    """Text of a literal, and the comma or bracket that ends it, which is read."""
    parts: list[str] = []
    depth = 0
    while True:
        char = yield from reader.scan(_STRUCTURE, parts.append)
        if not char:
            raise NotACallError
        if depth == 0 and char in ",)":
            yield from reader.one(lambda text: None)
            return "".join(parts), char
        yield from reader.one(parts.append)
        if char in _IN_STRING:
            yield from _read_string_rest(reader, char, parts)
        elif char != ",":
            depth += 1 if char in "([{" else -1


def _read_string_rest(reader: Reader, quote: str, parts: list[str]) -> Script[None]:
    while True:
        char = yield from reader.scan(_IN_STRING[quote], parts.append)
        if not char:
            raise NotACallError
        yield from reader.one(parts.append)
        if char == quote:
            return
        yield from reader.one(parts.append)


def _as_json(text: str) -> str:
    """JSON of a literal, which may be JSON itself; what is neither is taken as a string."""
    with contextlib.suppress(ValueError, RecursionError):
        return json_text_of(json.loads(text))
    try:
        return json_text_of(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return json.dumps(text, ensure_ascii=False)


PYTHONIC = ToolFormat(name="pythonic", read=read_pythonic, bare_starts=("[",))
