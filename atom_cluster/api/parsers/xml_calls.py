"""Tool calls as XML-like elements, one for each parameter: Qwen3-Coder, MiMo, MiniMax M2, DeepSeek V3.2 and V4, GLM.

Parameters become the members of a JSON object as they arrive; strings character by character.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from atom_cluster.api.parsers.calls import CallContext, NotACallError, ToolFormat
from atom_cluster.api.parsers.reader import Script
from atom_cluster.api.parsers.values import json_value
from atom_cluster.api.parsers.writer import ObjectWriter

Parameter = tuple[str, bool | None]
"""Its name, and whether its value is a string, where the text itself says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Elements:
    """The tags of one family."""

    call_open: str
    """In front of the call's name."""
    name_close: str
    """Behind it."""
    call_close: str
    parameter_open: str
    """In front of a parameter's name."""
    read_name: Callable[[CallContext], Script[Parameter]]
    """Reads the parameter's name and whatever stands in front of its value."""
    value_close: str
    trims_line_ends: bool
    """Whether the family puts a value on lines of its own."""


def _read_call(context: CallContext, elements: Elements) -> Script[None]:
    """One call, behind `call_open`."""
    name, _ = yield from context.expect_until(elements.name_close)
    name = name.strip("\"' \t\r\n")
    context.begin(name)
    yield from _read_parameters(context, elements, name)


def _read_parameters(
    context: CallContext, elements: Elements, tool: str, *, first_mark: str | None = None
) -> Script[None]:
    """Parameters up to the end of the call; `first_mark` was read already."""
    members = ObjectWriter(context.out)
    if first_mark:
        context.reader.record(first_mark)
    while True:
        yield from context.reader.space()
        mark = first_mark or (yield from context.reader.accept(elements.parameter_open, elements.call_close))
        first_mark = None
        if mark == elements.parameter_open:
            try:
                name, is_string = yield from elements.read_name(context)
            except NotACallError:
                _close_unless_cut_off(context, members)
                raise
            yield from _read_value(context, elements, members, tool=tool, name=name.strip(), is_string=is_string)
        elif mark == elements.call_close:
            members.end()
            context.end()
            return
        else:
            yield from context.reader.peek()
            context.reader.skip_begun(elements.parameter_open, elements.call_close)
            _close_unless_cut_off(context, members)
            raise NotACallError  # what follows is content


def _close_unless_cut_off(context: CallContext, members: ObjectWriter) -> None:
    if not context.reader.is_exhausted:
        members.end()


def _read_value(
    context: CallContext, elements: Elements, members: ObjectWriter, *, tool: str, name: str, is_string: bool | None
) -> Script[None]:
    members.key(name)
    if is_string is None:
        is_string = context.schemas.is_string(tool, name)
        types = context.schemas.types(tool, name)
    else:
        types = frozenset()
    if is_string:
        text = _StringValue(members, trims_line_ends=elements.trims_line_ends)
        members.quote()
        mark = yield from context.reader.until((elements.value_close,), text.write)
        if mark is None:
            text.finish()
        else:
            members.quote()
    else:
        value, mark = yield from context.reader.take_until(elements.value_close)
        if elements.trims_line_ends and value.startswith("\n"):
            value = value[1:].removesuffix("\n")
        members.value(json_value(value, types))
    context.settle()


class _StringValue:
    """Writes a string as it arrives, without the line ends around it: the last one is only one of those if there is a
    first one."""

    def __init__(self, members: ObjectWriter, *, trims_line_ends: bool) -> None:
        self._members = members
        self._may_trim = trims_line_ends
        self._trims = False
        self._held = ""

    def write(self, text: str) -> None:
        if self._may_trim:
            self._trims = text.startswith("\n")
            text = text.removeprefix("\n")
            self._may_trim = False
        if self._trims:
            text = self._held + text
            self._held = "\n" if text.endswith("\n") else ""
            text = text.removesuffix("\n")
        self._members.characters(text)

    def finish(self) -> None:
        """The value was cut off: the line end was its own."""
        self._members.characters(self._held)


def _name_until(close: str) -> Callable[[CallContext], Script[Parameter]]:
    def read(context: CallContext) -> Script[Parameter]:
        name, _ = yield from context.expect_until(close)
        return name.strip("\"'"), None

    return read


_QWEN = Elements(
    call_open="<function=",
    name_close=">",
    call_close="</function>",
    parameter_open="<parameter=",
    read_name=_name_until(">"),
    value_close="</parameter>",
    trims_line_ends=True,
)
_QWEN_OPEN, _QWEN_CLOSE = "<tool_call>", "</tool_call>"


def _read_qwen(context: CallContext, opener: str) -> Script[None]:
    """`<tool_call><function=name>...</function></tool_call>`; the outer element is left out now and then."""
    if opener == _QWEN_OPEN:
        yield from context.reader.space()
        yield from context.expect(_QWEN.call_open)
    yield from _read_call(context, _QWEN)
    space = yield from context.reader.space()
    context.reader.record(space)
    yield from context.expect(_QWEN_CLOSE)


_MINIMAX = Elements(
    call_open="<invoke name=",
    name_close=">",
    call_close="</invoke>",
    parameter_open="<parameter name=",
    read_name=_name_until(">"),
    value_close="</parameter>",
    trims_line_ends=True,
)
_MINIMAX_OPEN, _MINIMAX_CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"


def _read_minimax(context: CallContext, opener: str) -> Script[None]:
    yield from _read_block(context, _MINIMAX, _MINIMAX_CLOSE)


def _read_block(context: CallContext, elements: Elements, close: str) -> Script[None]:
    """Calls within one outer element; at least one, or it is content."""
    has_called = False
    while True:
        yield from context.reader.space()
        mark = yield from context.expect(elements.call_open, *([close] if has_called else []))
        if mark == close:
            return
        yield from _read_call(context, elements)
        has_called = True


_DSML_WORDS = ("｜DSML｜", "｜｜DSML｜｜")
"""V4 doubles the bars in places; what opens a block closes it."""
_DSML_BLOCKS = ("function_calls", "tool_calls")
"""V3.2's name of it, and V4's."""


def _dsml_elements(word: str) -> Elements:
    return Elements(
        call_open=f"<{word}invoke name=",
        name_close=">",
        call_close=f"</{word}invoke>",
        parameter_open=f"<{word}parameter name=",
        read_name=_read_dsml_name,
        value_close=f"</{word}parameter>",
        trims_line_ends=False,
    )


def _read_dsml_name(context: CallContext) -> Script[Parameter]:
    """`"city" string="true">`: the model says itself what is a string."""
    head, _ = yield from context.expect_until(">")
    name, _, attribute = head.partition(" string=")
    says = attribute.strip().strip("\"'")
    return name.strip().strip("\"'"), {"true": True, "false": False}.get(says)


_DSML = {
    f"<{word}{block}>": (_dsml_elements(word), f"</{word}{block}>") for word in _DSML_WORDS for block in _DSML_BLOCKS
}


def _read_dsml(context: CallContext, opener: str) -> Script[None]:
    elements, close = _DSML[opener]
    yield from _read_block(context, elements, close)


_GLM_OPEN, _GLM_CLOSE = "<tool_call>", "</tool_call>"
_GLM_KEY, _GLM_KEY_CLOSE = "<arg_key>", "</arg_key>"
_GLM_VALUE, _GLM_VALUE_CLOSE = "<arg_value>", "</arg_value>"


def _read_glm_name(context: CallContext) -> Script[Parameter]:
    name, _ = yield from context.expect_until(_GLM_KEY_CLOSE)
    yield from context.reader.space()
    yield from context.expect(_GLM_VALUE)
    return name, None


_GLM = Elements(
    call_open=_GLM_OPEN,
    name_close="",
    call_close=_GLM_CLOSE,
    parameter_open=_GLM_KEY,
    read_name=_read_glm_name,
    value_close=_GLM_VALUE_CLOSE,
    trims_line_ends=False,
)


def _read_glm(context: CallContext, opener: str) -> Script[None]:
    """`<tool_call>name<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>`, with or without line ends."""
    name, mark = yield from context.expect_until(_GLM_KEY, _GLM_CLOSE)
    name = name.strip()
    context.begin(name)
    yield from _read_parameters(context, _GLM, name, first_mark=mark)


QWEN3_CODER = ToolFormat(
    name="qwen3_coder",
    read=_read_qwen,
    openers=(_QWEN_OPEN, _QWEN.call_open),
    marks=(_QWEN_CLOSE,),
)
MINIMAX_M2 = ToolFormat(name="minimax_m2", read=_read_minimax, openers=(_MINIMAX_OPEN,), marks=(_MINIMAX_CLOSE,))
DEEPSEEK_V32, DEEPSEEK_V4 = (
    ToolFormat(name=name, read=_read_dsml, openers=tuple(_DSML), marks=_DSML_WORDS, ends_reasoning=True)
    for name in ("deepseek_v32", "deepseek_v4")
)
GLM = ToolFormat(
    name="glm",
    read=_read_glm,
    openers=(_GLM_OPEN,),
    marks=(_GLM_CLOSE, _GLM_KEY, _GLM_KEY_CLOSE, _GLM_VALUE, _GLM_VALUE_CLOSE),
)
