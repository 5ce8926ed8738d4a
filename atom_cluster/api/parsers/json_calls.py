"""Tool calls that are JSON objects with `name` and `arguments`, within marks of several families, or without any."""

from __future__ import annotations

import json
import re
import uuid

from atom_cluster.api.parsers.calls import CallContext, NotACallError, ToolFormat
from atom_cluster.api.parsers.reader import Reader, Script, Sink

_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[,}\]\s<]")
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type")
"""Keys that say nothing of the call and do not speak against one."""

_HERMES_OPEN, _HERMES_CLOSE = "<tool_call>", "</tool_call>"


def json_text(reader: Reader, sink: Sink) -> Script[bool]:
    """Give `sink` one JSON object, array or string as it is written; whether it came to its end."""
    depth = 0
    while True:
        char = yield from reader.scan(_STRUCTURE, sink)
        if not char:
            return False
        yield from reader.one(sink)
        if char == '"':
            if not (yield from _string_rest(reader, sink)):
                return False
        else:
            depth += 1 if char in "{[" else -1
        if depth <= 0:
            return True


def _string_rest(reader: Reader, sink: Sink) -> Script[bool]:
    """A JSON string behind its opening quote, as it is written; whether it came to its end."""
    while True:
        char = yield from reader.scan(_IN_STRING, sink)
        if not char:
            return False
        yield from reader.one(sink)
        if char == '"':
            return True
        yield from reader.one(sink)


def read_json_call(context: CallContext, *, is_bare: bool) -> Script[None]:
    """One object. `is_bare`: nothing but its keys and a known name tells it from an answer in JSON."""
    yield from context.expect("{")
    call = _JsonCall(context, is_bare=is_bare)
    while True:
        yield from context.reader.space()
        mark = yield from context.reader.accept('"', ",", "}")
        if mark == '"':
            yield from call.read_item()
        elif mark == "}" or (mark is None and call.has_begun):
            # Some models leave the last brace out.
            break
        elif mark is None:
            raise NotACallError
    call.finish()


class _JsonCall:
    """What is known of a call while its object is read: keys may come in any order."""

    def __init__(self, context: CallContext, *, is_bare: bool) -> None:
        self._context = context
        self._is_bare = is_bare
        self._name: str | None = None
        self._call_id: str | None = None
        self._early_arguments: str | None = None
        self.has_begun = False

    def read_item(self) -> Script[None]:
        """A key, behind its opening quote, and its value."""
        reader = self._context.reader
        key = yield from self._string()
        yield from reader.space()
        yield from self._context.expect(":")
        yield from reader.space()
        if key == "name" and self._name is None:
            yield from self._context.expect('"')
            self._name = yield from self._string()
            if self._is_bare and self._name not in self._context.schemas.names:
                raise NotACallError
        elif key in _ARGUMENT_KEYS and not self.has_begun and self._early_arguments is None:
            yield from self._read_arguments()
        elif self._is_bare and key not in _OTHER_KEYS:
            raise NotACallError
        else:
            value = yield from self._value()
            if key == "id" and value.startswith('"'):
                self._call_id = _unquoted(value)

    def finish(self) -> None:
        """The object has ended."""
        if not self.has_begun:
            if self._name is None:
                raise NotACallError
            self._begin()
            self._context.out.arguments(self._early_arguments or "{}")
        self._context.end()

    def _begin(self) -> None:
        assert self._name is not None
        self._context.begin(self._name, call_id=self._call_id or None)
        self.has_begun = True

    def _read_arguments(self) -> Script[None]:
        first = yield from self._context.reader.peek()
        if self._name is None:
            self._early_arguments = _arguments((yield from self._value()))
            return
        if first in ("{", "["):
            self._begin()
            if not (yield from json_text(self._context.reader, self._context.out.arguments)):
                raise NotACallError  # it was cut off
        else:
            text = _arguments((yield from self._value()))
            self._begin()
            self._context.out.arguments(text)
        self._context.settle()

    def _value(self) -> Script[str]:
        """Any value, as it is written. Raises `NotACallError` when it does not end."""
        reader = self._context.reader
        parts: list[str] = []
        first = yield from reader.peek()
        if first and first in '{["':
            if not (yield from json_text(reader, parts.append)):
                raise NotACallError
        elif not (yield from reader.scan(_SCALAR_END, parts.append)):
            raise NotACallError
        return "".join(parts)

    def _string(self) -> Script[str]:
        parts = ['"']
        if not (yield from _string_rest(self._context.reader, parts.append)):
            raise NotACallError
        return _unquoted("".join(parts))


def _unquoted(text: str) -> str:
    """What a JSON string says, with U+FFFD for half of a surrogate pair."""
    try:
        return str(json.loads(text, strict=False)).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    except ValueError as exc:
        raise NotACallError from exc


def _arguments(value: str) -> str:
    """Arguments that are not an object: some models write them as JSON within a string, or as null when none."""
    if value.startswith('"'):
        return _unquoted(value) or "{}"
    return "{}" if value in ("null", "") else value


def read_hermes(context: CallContext, opener: str) -> Script[None]:
    """`<tool_call>{...}</tool_call>`, once for each call."""
    while True:
        yield from context.reader.space()
        yield from read_json_call(context, is_bare=False)
        rest, mark = yield from context.reader.take_until(_HERMES_CLOSE, _HERMES_OPEN)
        context.out.text(rest.strip())
        if mark != _HERMES_OPEN:
            return
        context.reader.record(_HERMES_OPEN)


def read_bare(context: CallContext, opener: str) -> Script[None]:
    """One object, several with `;`, `,` or line ends between them, or a list of them."""
    reader = context.reader
    yield from reader.space()
    is_list = (yield from reader.accept("[")) is not None
    while True:
        yield from reader.space()
        yield from read_json_call(context, is_bare=True)
        space = yield from reader.space()
        reader.record(space)
        separator = yield from reader.accept(";", ",", *(["]"] if is_list else []))
        if separator == "]":
            return
        if separator is None and (yield from reader.peek()) != "{":
            raise NotACallError  # what follows is content


_MISTRAL_OPEN = "[TOOL_CALLS]"
_MISTRAL_ARGUMENTS, _MISTRAL_ID = "[ARGS]", "[CALL_ID]"


def read_mistral(context: CallContext, opener: str) -> Script[None]:
    """A JSON list of calls, or `name[ARGS]{...}` with an id in between in some versions."""
    reader = context.reader
    yield from reader.space()
    if (yield from reader.accept("[")) is None:
        yield from _read_named_arguments(context)
        return
    while True:
        yield from reader.space()
        yield from read_json_call(context, is_bare=False)
        yield from reader.space()
        if (yield from context.expect(",", "]")) == "]":
            return


def _read_named_arguments(context: CallContext) -> Script[None]:
    name, mark = yield from context.expect_until(_MISTRAL_ARGUMENTS, _MISTRAL_ID)
    call_id = None
    if mark == _MISTRAL_ID:
        call_id, _ = yield from context.expect_until(_MISTRAL_ARGUMENTS)
    yield from context.reader.space()
    if (yield from context.reader.peek()) != "{":
        raise NotACallError
    context.begin(name, call_id=call_id and call_id.strip())
    if (yield from json_text(context.reader, context.out.arguments)):
        context.end()


def mistral_call_id() -> str:
    """Nine letters and digits: Mistral's templates refuse other ids."""
    return uuid.uuid4().hex[:9]


HERMES = ToolFormat(name="hermes", read=read_hermes, openers=(_HERMES_OPEN,), marks=(_HERMES_CLOSE,))
LLAMA3_JSON = ToolFormat(
    name="llama3_json", read=read_bare, openers=("<|python_tag|>",), bare_starts=("{",), ends_reasoning=True
)
JSON = ToolFormat(name="json", read=read_bare, bare_starts=("{", "["))
MISTRAL = ToolFormat(
    name="mistral",
    read=read_mistral,
    openers=(_MISTRAL_OPEN,),
    marks=(_MISTRAL_ARGUMENTS, _MISTRAL_ID),
    ends_reasoning=True,
    new_call_id=mistral_call_id,
)
