"""Which formats of reasoning and calls a model uses, chosen once at start, and the parsers for one request.

Knows nothing of how requests are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from atom_cluster.api.answers.pieces import PLAIN, OutputParser
from atom_cluster.api.parsers import harmony
from atom_cluster.api.parsers.answer import ReasoningFormat, ScriptParser, read_answer
from atom_cluster.api.parsers.calls import CallContext, ToolFormat
from atom_cluster.api.parsers.json_calls import HERMES, JSON, LLAMA3_JSON, MISTRAL
from atom_cluster.api.parsers.marked_calls import DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2
from atom_cluster.api.parsers.pythonic import PYTHONIC
from atom_cluster.api.parsers.reader import Reader
from atom_cluster.api.parsers.values import ToolSchemas
from atom_cluster.api.parsers.writer import PieceWriter, random_call_id
from atom_cluster.api.parsers.xml_calls import DEEPSEEK_V4, DEEPSEEK_V32, GLM, MINIMAX_M2, QWEN3_CODER
from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import ConfigError

TOOL_FORMATS = {
    entry.name: entry
    for entry in (
        HERMES,
        QWEN3_CODER,
        DEEPSEEK_V3,
        DEEPSEEK_V31,
        DEEPSEEK_V32,
        DEEPSEEK_V4,
        GLM,
        KIMI_K2,
        MINIMAX_M2,
        harmony.CALLS,
        LLAMA3_JSON,
        PYTHONIC,
        MISTRAL,
        JSON,
    )
}
REASONING_FORMATS = {
    entry.name: entry
    for entry in (
        ReasoningFormat(name="think", opener="<think>", closer="</think>"),
        ReasoningFormat(name="interleaved_think", opener="<think>", closer="</think>", can_reopen=True),
        ReasoningFormat(name="mistral", opener="[THINK]", closer="[/THINK]"),
        harmony.REASONING,
    )
}

_TOOL_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("｜DSML｜", "tool_calls>"), "deepseek_v4"),
    (("｜DSML｜",), "deepseek_v32"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<arg_key>",), "glm"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<|channel|>", "functions."), "harmony"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("[func_name1(",), "pythonic"),
    (('"parameters": dictionary',), "llama3_json"),
    (("<|python_tag|>",), "llama3_json"),
)
"""Texts that a chat template has where it shows the model how to call tools, the most telling first."""
_REASONING_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "analysis"), "harmony"),
    (("</think>", "<minimax:tool_call>"), "interleaved_think"),
    (("</think>",), "think"),
    (("[/THINK]",), "mistral"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What one request's calls may be."""

    parameters_by_name: Mapping[str, Mapping[str, Any] | None]
    """Each tool that may be called, with the JSON schema of its arguments."""
    one_call: bool
    """The output ends after its first call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the outputs of one request are read."""

    parser: Callable[[], OutputParser]
    """A parser for one output."""
    shown_ids: frozenset[int] = frozenset()
    """Special tokens that the parsers have to see."""


PLAIN_READING = Reading(parser=lambda: PLAIN)
"""All text is content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """A model's formats."""

    reasoning: ReasoningFormat | None
    tools: ToolFormat | None
    special_ids_by_mark: Mapping[str, int]
    """Marks of the formats that are special tokens of this vocabulary."""
    choices: Mapping[str, str]
    """What was chosen and why, for people."""

    def reading(self, *, prompt_end: str, tools: ToolUse | None) -> Reading:
        """How to read the outputs of a request whose prompt ends so. `tools` None: no call is wanted."""
        tool_format = self.tools if tools is not None else None
        if self.reasoning is None and tool_format is None:
            return PLAIN_READING
        marks = (self.reasoning.all_marks if self.reasoning else ()) + (tool_format.all_marks if tool_format else ())
        shown_ids = frozenset(self.special_ids_by_mark[mark] for mark in marks if mark in self.special_ids_by_mark)
        is_open = self.reasoning is not None and prompt_end.rstrip().endswith(self.reasoning.opener)
        return Reading(parser=lambda: self._parser(tool_format, tools, is_open=is_open), shown_ids=shown_ids)

    def _parser(self, tool_format: ToolFormat | None, tools: ToolUse | None, *, is_open: bool) -> OutputParser:
        reader = Reader()
        out = PieceWriter(
            one_call=tools is not None and tools.one_call,
            new_call_id=tool_format.new_call_id or random_call_id if tool_format else random_call_id,
        )
        schemas = ToolSchemas(tools.parameters_by_name if tools else {})
        context = CallContext(reader=reader, out=out, schemas=schemas)
        if harmony.REASONING is self.reasoning or harmony.CALLS is tool_format:
            script = harmony.read_harmony(
                context, has_tools=tool_format is not None, has_reasoning=self.reasoning is not None
            )
        else:
            script = read_answer(context, reasoning=self.reasoning, tools=tool_format, opens_in_reasoning=is_open)
        return ScriptParser(script, reader, out)


def choose_dialect(
    *, tool_parser: str, reasoning_parser: str, template: ChatTemplate | None, tokenizer: Tokenizer
) -> Dialect:
    """The formats of a model. Both parsers are names, or "auto" or "none", as in `ApiConfig`.

    Raises `ConfigError` for two that do not go together.
    """
    tool_name, tool_reason = _choose_tools(tool_parser, template)
    reasoning_name, reasoning_reason = _choose_reasoning(reasoning_parser, template, tokenizer)
    if "harmony" in (tool_name, reasoning_name) and not {tool_name, reasoning_name} <= {"harmony", None}:
        raise ConfigError(
            f"api.tool_parser {tool_name} ({tool_reason}) and api.reasoning_parser {reasoning_name}"
            f" ({reasoning_reason}) do not go together: harmony is a format of whole answers"
        )
    tools = TOOL_FORMATS[tool_name] if tool_name else None
    reasoning = REASONING_FORMATS[reasoning_name] if reasoning_name else None
    marks = {*(tools.all_marks if tools else ()), *(reasoning.all_marks if reasoning else ())}
    ids = {mark: token_id for mark in marks if (token_id := tokenizer.token_id(mark)) is not None}
    return Dialect(
        reasoning=reasoning,
        tools=tools,
        special_ids_by_mark={mark: token_id for mark, token_id in ids.items() if tokenizer.is_special(token_id)},
        choices={
            "tool_parser": f"{tool_name or 'none'}: {tool_reason}",
            "reasoning_parser": f"{reasoning_name or 'none'}: {reasoning_reason}",
        },
    )


def _choose_tools(setting: str, template: ChatTemplate | None) -> tuple[str | None, str]:
    if setting != "auto":
        return (None if setting == "none" else setting), "configured"
    if template is None:
        return None, "the model has no chat template"
    if not template.knows_tools:
        return None, "the chat template knows no tools"
    return _by_sign(_TOOL_SIGNS, template) or (
        "json",
        "the chat template shows tools, and no format that is known here",
    )


def _choose_reasoning(setting: str, template: ChatTemplate | None, tokenizer: Tokenizer) -> tuple[str | None, str]:
    if setting != "auto":
        return (None if setting == "none" else setting), "configured"
    found = _by_sign(_REASONING_SIGNS, template) if template else None
    if found is not None:
        return found
    for entry in REASONING_FORMATS.values():
        if all(tokenizer.token_id(mark) is not None for mark in entry.all_marks):
            return entry.name, f"the vocabulary has {entry.opener} and {entry.closer}"
    return None, "neither chat template nor vocabulary has marks of reasoning"


def _by_sign(signs: tuple[tuple[tuple[str, ...], str], ...], template: ChatTemplate) -> tuple[str, str] | None:
    for texts, name in signs:
        if all(text in template.source for text in texts):
            return name, f"the chat template has {' and '.join(texts)}"
    return None
