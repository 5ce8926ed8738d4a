"""What a chat request says of tools: checked, and in the forms that templates and parsers take. Knows no format."""

from __future__ import annotations

import json
from collections.abc import Sequence

from atom_cluster.api.http.request_body import has_lone_surrogate
from atom_cluster.api.openai.chat_messages import ChatMessage, NamedTool, Tool
from atom_cluster.api.openai.requests import ChatCompletionRequest
from atom_cluster.api.parsers.dialect import ToolUse
from atom_cluster.config.serving import ApiConfig
from atom_cluster.errors import InvalidRequest

ToolJson = dict[str, object]


def check_tools(request: ChatCompletionRequest, limits: ApiConfig) -> None:
    """Raise `InvalidRequest` for tools that are too many, too large or named twice, and for a choice among none."""
    tools = request.tools or []
    choice = request.tool_choice
    if len(tools) > limits.max_tools:
        raise InvalidRequest(f"at most {limits.max_tools} tools are allowed", param="tools")
    num_bytes = 0
    names: set[str] = set()
    for index, tool in enumerate(tools):
        name = tool.function.name
        if name in names:
            raise InvalidRequest(f"two tools are named {name!r}", param=f"tools[{index}].function.name")
        names.add(name)
        num_bytes += len(json.dumps(tool.model_dump(exclude_unset=True)))
        if num_bytes > limits.max_tool_bytes:
            raise InvalidRequest(f"tools have at most {limits.max_tool_bytes} bytes, as JSON", param="tools")
        _check_parameters(tool.function.parameters, index, limits)
    if choice == "required" and not tools:
        raise InvalidRequest('`tool_choice` is "required", and there are no `tools`', param="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidRequest(
            f"`tool_choice` names {choice.function.name[:100]!r}, which is not among `tools`", param="tool_choice"
        )


def offered_tools(request: ChatCompletionRequest) -> Sequence[Tool]:
    """The tools that the model may call: none when `tool_choice` says so."""
    return () if request.tool_choice == "none" else request.tools or ()


def tool_use(request: ChatCompletionRequest) -> ToolUse | None:
    """What a parser has to know; None when no call is wanted."""
    tools = offered_tools(request)
    if not tools:
        return None
    return ToolUse(
        parameters_by_name={tool.function.name: tool.function.parameters for tool in tools},
        one_call=request.parallel_tool_calls is False or isinstance(request.tool_choice, NamedTool),
    )


def template_tools(request: ChatCompletionRequest) -> list[ToolJson]:
    """The tools for a chat template, as the client wrote them."""
    return [tool.model_dump(exclude_unset=True) for tool in offered_tools(request)]


def template_message(message: ChatMessage, *, distinguishes_none: bool) -> ToolJson:
    """Keys that templates know, and only those given: some templates test for their presence.

    `distinguishes_none`: whether the template tests for content that is none, as a sign of calls. Others would print
    the word.
    """
    content = message.content if message.content is not None or distinguishes_none else ""
    result: ToolJson = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": past_arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    thought = message.reasoning if message.reasoning_content is None else message.reasoning_content
    for name, value in (
        ("name", message.name),
        ("reasoning_content", thought),
        ("tool_call_id", message.tool_call_id),
    ):
        if value is not None:
            result[name] = value
    return result


class PastArguments(dict[str, object]):
    """Arguments of an earlier call: an object for templates that go through its items, text for those that print it."""

    def __init__(self, text: str, items: dict[str, object]) -> None:
        super().__init__(items)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: object) -> str:
        return self._text + str(other)

    def __radd__(self, other: object) -> str:
        return str(other) + self._text


def past_arguments(text: str) -> PastArguments | str:
    """Arguments of an earlier call for a chat template; what is not a JSON object of text stays as the model
    wrote it."""
    try:
        items = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    if not isinstance(items, dict) or ("\\u" in text and has_lone_surrogate(items)):
        return text
    return PastArguments(text, items)


def unreadable_arguments(messages: Sequence[ChatMessage]) -> str | None:
    """The field of the first earlier call whose arguments are not a JSON object, as some templates need them to be."""
    for position, message in enumerate(messages):
        for index, call in enumerate(message.tool_calls or ()):
            if isinstance(past_arguments(call.function.arguments), str):
                return f"messages[{position}].tool_calls[{index}].function.arguments"
    return None


def _check_parameters(parameters: dict[str, object] | None, index: int, limits: ApiConfig) -> None:
    param = f"tools[{index}].function.parameters"
    if parameters is None:
        return
    if parameters.get("type", "object") != "object":
        raise InvalidRequest("`parameters` describes an object", param=f"{param}.type")
    level: list[object] = [parameters]
    for _ in range(limits.max_tool_depth):
        level = [child for entry in level for child in _children(entry)]
        if not level:
            return
    raise InvalidRequest(f"`parameters` is nested at most {limits.max_tool_depth} deep", param=param)


def _children(value: object) -> list[object]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, (dict, list))]
