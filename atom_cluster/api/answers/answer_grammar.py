"""The grammar of a chat answer, around what a model thinks before it. Knows no format of calls.

`tool_choice` "required" or a name: the output is calls. Otherwise, with structured output: it is calls, or what was
asked for. Otherwise, with `strict` tools: free text, and perhaps calls. Without tools it is what was asked for. What a
model thinks before it answers is free.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import msgspec

from atom_cluster.api.answers.grammars import reasoning_end
from atom_cluster.api.openai.chat_messages import NamedTool, Tool
from atom_cluster.api.openai.requests import ChatCompletionRequest
from atom_cluster.api.openai.structured_fields import WantedGrammar, wanted_grammar
from atom_cluster.api.openai.tools import offered_tools
from atom_cluster.api.parsers import harmony
from atom_cluster.api.parsers.answer import ReasoningFormat
from atom_cluster.api.parsers.call_grammars import CALL_WRITERS, CallableTool, CallsToWrite
from atom_cluster.api.parsers.calls import ToolFormat
from atom_cluster.api.parsers.dialect import Dialect
from atom_cluster.api.parsers.lark_writer import GrammarTooLongError, LarkWriter
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import InvalidRequest
from atom_cluster.messages.requests import GrammarSpec

_BARE_SLASH = re.compile(r"(\\.)|/", re.DOTALL)


def chat_grammar(
    request: ChatCompletionRequest, *, dialect: Dialect, prompt_end: str, tokenizer: Tokenizer, max_bytes: int
) -> WantedGrammar | None:
    """The grammar; None where anything goes. Raises `InvalidRequest` for what cannot be enforced or combined."""
    wanted = wanted_grammar(request, max_bytes=max_bytes)
    lark = LarkWriter(tokenizer.token_id, max_bytes=max_bytes)
    try:
        return _answer_grammar(lark, request, wanted, dialect=dialect, prompt_end=prompt_end, tokenizer=tokenizer)
    except GrammarTooLongError as exc:
        has_calls = dialect.tools is not None and offered_tools(request)
        where = wanted.param if wanted is not None and not has_calls else "tools"
        detail = f"what `{where}` allows needs a grammar of more than {max_bytes} bytes"
        raise InvalidRequest(detail, param=where) from exc


def _answer_grammar(
    lark: LarkWriter,
    request: ChatCompletionRequest,
    wanted: WantedGrammar | None,
    *,
    dialect: Dialect,
    prompt_end: str,
    tokenizer: Tokenizer,
) -> WantedGrammar | None:
    calls = _wanted_calls(lark, request, wanted, dialect)
    after = reasoning_end(dialect, prompt_end, tokenizer)
    thinks_with = None if after else _reasoning_of_its_own(lark, dialect.reasoning, prompt_end)
    if calls is not None and dialect.tools is harmony.CALLS:
        return _finished(lark, _harmony_start(lark, calls), after=(), param=calls.param)
    if calls is not None:
        start = _start(lark, calls.answer(lark), thinks_with=thinks_with, is_behind=bool(after))
        return _finished(lark, start, after=after, param=calls.param)
    if wanted is None:
        return None
    if thinks_with is None or wanted.spec.kind == "lark":
        return WantedGrammar(msgspec.structs.replace(wanted.spec, after=after), wanted.param)
    start = _start(lark, _content(lark, wanted), thinks_with=thinks_with, is_behind=False)
    return _finished(lark, start, after=(), param=wanted.param)


def _finished(lark: LarkWriter, start: str, *, after: tuple[int, ...], param: str) -> WantedGrammar:
    return WantedGrammar(GrammarSpec(kind="lark", text=lark.grammar(start), after=after), param)


@dataclass(frozen=True, slots=True, kw_only=True)
class _WantedCalls:
    """Calls in a grammar, as an expression, and what may stand in their place or before them."""

    calls: str
    content: str | None
    """None: nothing; there has to be a call."""
    can_talk: bool
    """Whether calls may follow the content, rather than take its place."""
    param: str

    def answer(self, lark: LarkWriter) -> str:
        if self.content is None:
            return self.calls
        if self.can_talk:
            return lark.rule(f"{self.content} {self.calls}?")
        return lark.one_of([self.calls, self.content])


def _wanted_calls(
    lark: LarkWriter, request: ChatCompletionRequest, wanted: WantedGrammar | None, dialect: Dialect
) -> _WantedCalls | None:
    tools = offered_tools(request)
    must_call = request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)
    if not tools:
        return None
    if dialect.tools is None:
        if must_call:
            raise InvalidRequest(f"no call can be enforced: tool parser {_why(dialect)}", param="tool_choice")
        return None
    content: str | None = None
    if not must_call and wanted is not None:
        content = _content(lark, wanted)
    elif not must_call:
        if not (any(tool.function.strict for tool in tools) and _has_token_opener(lark, dialect.tools)):
            return None
        content = lark.text()
    return _WantedCalls(
        calls=_calls(lark, request, dialect.tools, enforces_all=must_call),
        content=content,
        can_talk=wanted is None,
        param="tool_choice" if must_call else "tools",
    )


def _why(dialect: Dialect) -> str:
    return dialect.choices["tool_parser"]


def _has_token_opener(lark: LarkWriter, tools: ToolFormat) -> bool:
    """Whether free text can be told from a call: by a token, which text does not have."""
    return tools is harmony.CALLS or any(lark.is_token(opener) for opener in tools.openers[:1])


def _calls(lark: LarkWriter, request: ChatCompletionRequest, tools: ToolFormat, *, enforces_all: bool) -> str:
    """`enforces_all`: schemas of tools that are not strict count, too, as far as they can be enforced."""
    choice = request.tool_choice
    offered = offered_tools(request)
    if isinstance(choice, NamedTool):
        offered = [tool for tool in offered if tool.function.name == choice.function.name]
    calls = CallsToWrite(
        tools=[_callable(tool, enforces=enforces_all) for tool in offered],
        one_call=isinstance(choice, NamedTool) or request.parallel_tool_calls is False,
    )
    return lark.rule(CALL_WRITERS[tools.name](lark, calls))


def _callable(tool: Tool, *, enforces: bool) -> CallableTool:
    is_strict = bool(tool.function.strict)
    parameters = (tool.function.parameters or {}) if is_strict or enforces else {}
    return CallableTool(name=tool.function.name, parameters=parameters, is_strict=is_strict)


def _content(lark: LarkWriter, wanted: WantedGrammar) -> str:
    spec = wanted.spec
    if spec.kind in ("json_object", "json_schema"):
        schema = json.loads(spec.text) if spec.kind == "json_schema" else {"type": "object"}
        is_strict = schema.pop("x-guidance", None) is None
        return lark.json(schema, is_strict=is_strict)
    if spec.kind == "choice":
        return lark.one_of([lark.literal(choice) for choice in json.loads(spec.text)])
    if spec.kind == "regex":
        escaped = _BARE_SLASH.sub(lambda match: match.group(1) or "\\/", spec.text).replace("\n", "\\n")
        return lark.rule(f"/{escaped}/")
    raise InvalidRequest(f"`{wanted.param}` cannot be combined with `tools`", param=wanted.param)


def _reasoning_of_its_own(
    lark: LarkWriter, reasoning: ReasoningFormat | None, prompt_end: str
) -> ReasoningFormat | None:
    """The reasoning that the model may begin itself: where the prompt has not closed it, and tokens tell its end."""
    if reasoning is None or reasoning is harmony.REASONING or prompt_end.rstrip().endswith(reasoning.closer):
        return None
    return reasoning if lark.is_token(reasoning.opener) and lark.is_token(reasoning.closer) else None


def _start(lark: LarkWriter, answer: str, *, thinks_with: ReasoningFormat | None, is_behind: bool) -> str:
    """The answer behind reasoning, which is over if `is_behind`, and which `thinks_with` allows."""
    line = lark.literal("\n")
    gap = lark.rule(f"({line} {line}?)?")
    if is_behind:
        return f"{gap} {answer}"
    if thinks_with is None:
        return answer
    thought = f"{lark.mark(thinks_with.opener)} {lark.text()} {lark.mark(thinks_with.closer)} {gap}"
    return f"({line}? {thought})? {answer}"


def _harmony_start(lark: LarkWriter, calls: _WantedCalls) -> str:
    """Messages for the user or for the model itself, then a call or the final message."""
    channel, message = lark.mark("<|channel|>"), lark.mark("<|message|>")
    kind = lark.one_of([lark.literal("analysis"), lark.literal("commentary")])
    end, start = lark.mark("<|end|>"), lark.mark("<|start|>")
    before = lark.rule(f"{channel} {kind} {message} {lark.text()} {end} {start} {lark.literal('assistant')}")
    if calls.content is None:
        return f"{before}* {calls.calls}"
    final = f"{channel} {lark.literal('final')} {message} {calls.content}"
    return f"{before}* {lark.one_of([calls.calls, final])}"
