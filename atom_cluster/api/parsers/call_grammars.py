"""Grammars of tool calls: what an output looks like that calls one of the request's tools, in each family's format.

The reverse of the parsers: what these grammars allow, they read as calls with arguments that the schemas accept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atom_cluster.api.parsers.lark_writer import LarkWriter
from atom_cluster.api.parsers.values import ToolSchemas


@dataclass(frozen=True, slots=True, kw_only=True)
class CallableTool:
    """A tool that may be called."""

    name: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments."""
    is_strict: bool
    """Whether a schema that cannot be enforced as a whole is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallsToWrite:
    """Which calls a grammar allows."""

    tools: Sequence[CallableTool]
    one_call: bool

    def arguments(self, lark: LarkWriter, tool: CallableTool) -> str:
        """The arguments as JSON."""
        return lark.json({"type": "object", **tool.parameters}, is_strict=tool.is_strict)


_LINE = "\n"
_DSML = "｜DSML｜"
_MAX_COUNTED_CHARS = 1000
"""Counting characters takes the grammar's library as many states."""

Writer = Callable[[LarkWriter, CallsToWrite], str]
"""Gives the expression for all of an output's calls."""


def _json_object(lark: LarkWriter, calls: CallsToWrite, tool: CallableTool, key: str) -> str:
    head = lark.literal(f'{{"name": "{tool.name}", "{key}": ')
    return f"{head} {calls.arguments(lark, tool)} {lark.literal('}')}"


def _any_json_object(lark: LarkWriter, calls: CallsToWrite, key: str = "arguments") -> str:
    return lark.one_of([_json_object(lark, calls, tool, key) for tool in calls.tools])


def _hermes(lark: LarkWriter, calls: CallsToWrite) -> str:
    line = lark.literal("\n")
    body = _any_json_object(lark, calls)
    call = lark.rule(f"{lark.mark('<tool_call>')} {line} {body} {line} {lark.mark('</tool_call>')}")
    return lark.repeated(call, line, only_once=calls.one_call)


def _llama3_json(lark: LarkWriter, calls: CallsToWrite) -> str:
    call = lark.rule(_any_json_object(lark, calls, "parameters"))
    return lark.repeated(call, lark.literal("; "), only_once=calls.one_call)


def _json(lark: LarkWriter, calls: CallsToWrite) -> str:
    call = lark.rule(_any_json_object(lark, calls))
    if calls.one_call:
        return call
    many = f"{lark.literal('[')} {lark.repeated(call, lark.literal(', '), only_once=False)} {lark.literal(']')}"
    return lark.one_of([call, many])


def _mistral(lark: LarkWriter, calls: CallsToWrite) -> str:
    opener = lark.mark("[TOOL_CALLS]")
    if lark.is_token("[ARGS]"):
        arguments = lark.mark("[ARGS]")
        each = [f"{lark.literal(tool.name)} {arguments} {calls.arguments(lark, tool)}" for tool in calls.tools]
        call = lark.rule(f"{opener} {lark.one_of(each)}")
        return call if calls.one_call else f"{call}+"
    call = lark.rule(_any_json_object(lark, calls))
    body = lark.repeated(call, lark.literal(", "), only_once=calls.one_call)
    return f"{opener} {lark.literal('[')} {body} {lark.literal(']')}"


def _deepseek_v3(lark: LarkWriter, calls: CallsToWrite) -> str:
    head = f"{lark.literal('function')} {lark.mark('<｜tool▁sep｜>')}"
    tail = lark.literal("\n```")
    each = [
        f"{head} {lark.literal(f'{tool.name}{_LINE}```json{_LINE}')} {calls.arguments(lark, tool)} {tail}"
        for tool in calls.tools
    ]
    return _deepseek_section(lark, calls, each, separator=lark.literal("\n"))


def _deepseek_v31(lark: LarkWriter, calls: CallsToWrite) -> str:
    separator = lark.mark("<｜tool▁sep｜>")
    each = [f"{lark.literal(tool.name)} {separator} {calls.arguments(lark, tool)}" for tool in calls.tools]
    return _deepseek_section(lark, calls, each, separator="")


def _deepseek_section(lark: LarkWriter, calls: CallsToWrite, each: Sequence[str], *, separator: str) -> str:
    begin, end = lark.mark("<｜tool▁call▁begin｜>"), lark.mark("<｜tool▁call▁end｜>")
    call = lark.rule(f"{begin} {lark.one_of(each)} {end}")
    body = lark.repeated(call, separator, only_once=calls.one_call)
    return f"{lark.mark('<｜tool▁calls▁begin｜>')} {body} {lark.mark('<｜tool▁calls▁end｜>')}"


def _kimi_k2(lark: LarkWriter, calls: CallsToWrite) -> str:
    number = lark.rule("/[0-9]{1,3}/")
    separator = lark.mark("<|tool_call_argument_begin|>")
    each = [
        f"{lark.literal(f'functions.{tool.name}:')} {number} {separator} {calls.arguments(lark, tool)}"
        for tool in calls.tools
    ]
    call = lark.rule(f"{lark.mark('<|tool_call_begin|>')} {lark.one_of(each)} {lark.mark('<|tool_call_end|>')}")
    body = lark.repeated(call, "", only_once=calls.one_call)
    return f"{lark.mark('<|tool_calls_section_begin|>')} {body} {lark.mark('<|tool_calls_section_end|>')}"


def _harmony(lark: LarkWriter, calls: CallsToWrite) -> str:
    """One call: the token behind it ends the output."""
    each = []
    for tool in calls.tools:
        head = f"{lark.mark('<|channel|>')} {lark.literal(f'commentary to=functions.{tool.name} ')}"
        kind = f"{lark.mark('<|constrain|>')} {lark.literal('json')} {lark.mark('<|message|>')}"
        each.append(f"{head} {kind} {calls.arguments(lark, tool)}")
    return lark.one_of(each)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parameter:
    """One parameter of a tool, for formats that write each by itself."""

    name: str
    schema: Mapping[str, Any]
    shared: Mapping[str, Any]
    """Definitions that the schema may refer to."""
    is_required: bool
    is_text: bool
    """Whether its value is written as the string itself."""
    is_strict: bool

    def value(self, lark: LarkWriter, close: str) -> str:
        """The value and the text or token that closes it."""
        known = self.known_value(lark)
        return lark.text_up_to(close, self.max_chars) if known is None else f"{known} {lark.mark(close)}"

    @property
    def max_chars(self) -> int | None:
        """Most characters of text, where the schema has a limit that is small enough to count up to."""
        most = self.schema.get("maxLength")
        return most if isinstance(most, int) and 0 <= most <= _MAX_COUNTED_CHARS else None

    def known_value(self, lark: LarkWriter) -> str | None:
        """The value, when its grammar says where it ends; None for any text."""
        choices = self.schema.get("enum")
        if self.is_text and isinstance(choices, list) and choices:
            return lark.one_of([lark.literal(str(choice)) for choice in choices])
        return None if self.is_text else self.json(lark)

    def json(self, lark: LarkWriter) -> str:
        """The value as JSON."""
        return lark.json({**self.schema, **self.shared}, is_strict=self.is_strict)


def _parameters(tool: CallableTool) -> Iterator[_Parameter]:
    """In the schema's order, one when the one before is written: a grammar that is too long is given up early."""
    schemas = ToolSchemas({tool.name: tool.parameters})
    arguments = schemas.arguments(tool.name)
    properties, listed = arguments.get("properties"), arguments.get("required")
    required = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    for name in properties if isinstance(properties, Mapping) else ():
        yield _Parameter(
            name=name,
            schema=schemas.schema(tool.name, name) or {},
            shared=shared,
            is_required=name in required,
            is_text=schemas.types(tool.name, name) in (frozenset(), {"string"}),
            is_strict=tool.is_strict,
        )


def _in_order(lark: LarkWriter, tool: CallableTool, write: Callable[[_Parameter], str]) -> str:
    """An expression for each parameter; those that are not required may be left out."""
    rules = [(lark.rule(write(parameter)), parameter.is_required) for parameter in _parameters(tool)]
    return " ".join(rule if is_required else f"{rule}?" for rule, is_required in rules)


def _qwen3_coder(lark: LarkWriter, calls: CallsToWrite) -> str:
    def write(parameter: _Parameter) -> str:
        known = parameter.known_value(lark)
        if known is None:
            # The line end in front of the tag is part of the text here: the first tag ends it, whatever is before.
            value = lark.text_up_to("</parameter>", parameter.max_chars)
        else:
            value = f"{known} {lark.literal(_LINE + '</parameter>')}"
        return f"{lark.literal(f'<parameter={parameter.name}>{_LINE}')} {value} {lark.literal(_LINE)}"

    each = [f"{lark.literal(f'<function={tool.name}>{_LINE}')} {_in_order(lark, tool, write)}" for tool in calls.tools]
    line = lark.literal(_LINE)
    body = f"{lark.one_of(each)} {lark.literal(f'</function>{_LINE}')}"
    call = lark.rule(f"{lark.mark('<tool_call>')} {line} {body} {lark.mark('</tool_call>')}")
    return lark.repeated(call, line, only_once=calls.one_call)


def _minimax_m2(lark: LarkWriter, calls: CallsToWrite) -> str:
    def write(parameter: _Parameter) -> str:
        head = lark.literal(f'<parameter name="{parameter.name}">')
        return f"{head} {parameter.value(lark, '</parameter>')} {lark.literal(_LINE)}"

    each = []
    for tool in calls.tools:
        head, tail = lark.literal(f'<invoke name="{tool.name}">{_LINE}'), lark.literal(f"</invoke>{_LINE}")
        each.append(f"{head} {_in_order(lark, tool, write)} {tail}")
    body = lark.repeated(lark.rule(lark.one_of(each)), "", only_once=calls.one_call)
    return f"{lark.mark('<minimax:tool_call>')} {lark.literal(_LINE)} {body} {lark.mark('</minimax:tool_call>')}"


def _deepseek_elements(block: str) -> Writer:
    """Elements of V3.2 and V4; all of their names have the same token in front."""

    def write_calls(lark: LarkWriter, calls: CallsToWrite) -> str:
        def tag(text: str) -> str:
            slash = "/" if text.startswith("/") else ""
            return f"{lark.literal('<' + slash)} {lark.mark(_DSML)} {lark.literal(text.removeprefix('/'))}"

        def write(parameter: _Parameter) -> str:
            says = "true" if parameter.is_text else "false"
            head = tag(f'parameter name="{parameter.name}" string="{says}">')
            known = parameter.known_value(lark)
            if known is not None:
                return f"{head} {known} {tag(f'/parameter>{_LINE}')}"
            if not lark.is_token(_DSML):
                return f"{head} {lark.text_up_to(f'</{_DSML}parameter>', parameter.max_chars)} {lark.literal(_LINE)}"
            # The token ends the text; the bracket and the slash in front of it are text as long as it has not come.
            text = lark.text_before("</", parameter.max_chars)
            return f"{head} {text} {lark.mark(_DSML)} {lark.literal(f'parameter>{_LINE}')}"

        each = []
        for tool in calls.tools:
            head, tail = tag(f'invoke name="{tool.name}">{_LINE}'), tag(f"/invoke>{_LINE}")
            each.append(f"{head} {_in_order(lark, tool, write)} {tail}")
        body = lark.repeated(lark.rule(lark.one_of(each)), "", only_once=calls.one_call)
        return f"{tag(f'{block}>{_LINE}')} {body} {tag(f'/{block}>')}"

    return write_calls


def _glm(lark: LarkWriter, calls: CallsToWrite) -> str:
    gap = lark.rule(f"{lark.literal(_LINE)}?")

    def write(parameter: _Parameter) -> str:
        key = f"{lark.mark('<arg_key>')} {lark.literal(parameter.name)} {lark.mark('</arg_key>')}"
        return f"{key} {gap} {lark.mark('<arg_value>')} {parameter.value(lark, '</arg_value>')} {gap}"

    each = [f"{lark.literal(tool.name)} {gap} {_in_order(lark, tool, write)}" for tool in calls.tools]
    call = lark.rule(f"{lark.mark('<tool_call>')} {lark.one_of(each)} {lark.mark('</tool_call>')}")
    return lark.repeated(call, gap, only_once=calls.one_call)


def _pythonic(lark: LarkWriter, calls: CallsToWrite) -> str:
    each = []
    for tool in calls.tools:
        # JSON values are read as well as Python's.
        parts = [
            (lark.rule(f"{lark.literal(f'{parameter.name}=')} {parameter.json(lark)}"), parameter.is_required)
            for parameter in _parameters(tool)
        ]
        each.append(f"{lark.literal(f'{tool.name}(')} {_listed(lark, parts)} {lark.literal(')')}")
    body = lark.repeated(lark.rule(lark.one_of(each)), lark.literal(", "), only_once=calls.one_call)
    return f"{lark.literal('[')} {body} {lark.literal(']')}"


def _listed(lark: LarkWriter, parts: Sequence[tuple[str, bool]]) -> str:
    """Parts in order with commas between those that are there; the flag says which have to be."""
    first = behind = ""
    """What may follow while nothing has been written, and behind something."""
    for part, is_required in reversed(parts):
        begun = f"{part} {behind}"
        first = lark.rule(begun) if is_required else lark.rule(f"{begun}\n  | {first}" if first else f"({begun})?")
        more = f"{lark.literal(', ')} {part}"
        behind = lark.rule(f"{more} {behind}" if is_required else f"({more})? {behind}")
    return first


CALL_WRITERS: Mapping[str, Writer] = {
    "hermes": _hermes,
    "qwen3_coder": _qwen3_coder,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v31": _deepseek_v31,
    "deepseek_v32": _deepseek_elements("function_calls"),
    "deepseek_v4": _deepseek_elements("tool_calls"),
    "glm": _glm,
    "kimi_k2": _kimi_k2,
    "minimax_m2": _minimax_m2,
    "harmony": _harmony,
    "llama3_json": _llama3_json,
    "pythonic": _pythonic,
    "mistral": _mistral,
    "json": _json,
}
"""By the name of the format."""
