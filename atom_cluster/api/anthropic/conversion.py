"""A request to /v1/messages becomes the chat request that means the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence

from atom_cluster.api.anthropic.requests import (
    Block,
    ClientTool,
    MessageParam,
    MessagesRequest,
    MessagesToolChoice,
    PromptFields,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from atom_cluster.api.http.field_names import fields_named
from atom_cluster.api.http.request_body import validate
from atom_cluster.api.openai.requests import ChatCompletionRequest
from atom_cluster.errors import InvalidRequest

FIELD_NAMES = {
    "messages": "messages",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "chat_template_kwargs": "thinking",
    "stop": "stop_sequences",
    "parallel_tool_calls": "tool_choice",
    ".function": "",
    ".parameters": ".input_schema",
}
"""What chat requests call a field, and what clients of /v1/messages do."""


def chat_request(body: PromptFields) -> ChatCompletionRequest:
    """The chat request. Raises `InvalidRequest` that names the client's field."""
    if body.messages[-1].role == "assistant":
        raise InvalidRequest(
            "this server does not continue the assistant's text: the last message must be the user's",
            param=f"messages[{len(body.messages) - 1}].role",
        )
    fields: dict[str, object] = {
        "model": body.model,
        "messages": [*_system(body.system), *_messages(body.messages)],
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        **_tool_choice(body.tool_choice),
        **_reasoning(body),
    }
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": body.stop_sequences,
            "stream": body.stream,
            "priority": body.priority,
        }
    with fields_named(FIELD_NAMES):
        return validate(ChatCompletionRequest, {name: value for name, value in fields.items() if value is not None})


def _system(blocks: Sequence[TextBlock]) -> list[dict[str, object]]:
    return [{"role": "system", "content": _text(blocks)}] if blocks else []


def _messages(messages: Sequence[MessageParam]) -> list[dict[str, object]]:
    """Turns of one role that follow each other are one turn."""
    for index, message in enumerate(messages):
        _check_places(message, index)
    result: list[dict[str, object]] = []
    for role, turns in itertools.groupby(messages, key=lambda message: message.role):
        blocks = [block for message in turns for block in message.content]
        result += _assistant(blocks) if role == "assistant" else _user(blocks)
    return result


def _check_places(message: MessageParam, index: int) -> None:
    """Calls and thoughts are the assistant's, results the user's."""
    foreign = (ToolResultBlock,) if message.role == "assistant" else (ToolUseBlock, ThinkingBlock)
    for position, block in enumerate(message.content):
        if isinstance(block, foreign):
            place = f"messages[{index}].content[{position}]"
            raise InvalidRequest(f"a {block.type} block does not belong to the {message.role}", param=place)


def _user(blocks: Iterable[Block]) -> list[dict[str, object]]:
    """Results of calls are messages of their own, in the order of the blocks; text between them is too."""
    result: list[dict[str, object]] = []
    texts: list[TextBlock] = []

    def add_text() -> None:
        if texts:
            result.append({"role": "user", "content": _text(texts)})
            texts.clear()

    for block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, ToolResultBlock):
            add_text()
            content = ("Error: " if block.is_error else "") + _text(block.content)
            result.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
    add_text()
    return result


def _assistant(blocks: Sequence[Block]) -> list[dict[str, object]]:
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    result: dict[str, object] = {"role": "assistant", "content": _text(texts)}
    if thoughts:
        result["reasoning_content"] = "\n".join(thoughts)
    if calls:
        result["tool_calls"] = calls
    return [result]


def _call(block: ToolUseBlock) -> dict[str, object]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _text(blocks: Iterable[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)


def _tool(tool: ClientTool) -> dict[str, object]:
    function: dict[str, object] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: MessagesToolChoice | None) -> dict[str, object]:
    if choice is None:
        return {}
    if (choice.type == "tool") != (choice.name is not None):
        raise InvalidRequest('`tool_choice.name` goes with the type "tool", and only with it', param="tool_choice.name")
    wanted: object = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type)
    if choice.type == "tool":
        wanted = {"type": "function", "function": {"name": choice.name}}
    is_single = choice.disable_parallel_tool_use
    return {"tool_choice": wanted, "parallel_tool_calls": None if is_single is None else not is_single}


def _reasoning(body: PromptFields) -> dict[str, object]:
    fields: dict[str, object] = {}
    if body.thinking is not None:
        thinks = body.thinking.type != "disabled"
        # Families' templates know one name or the other.
        fields["chat_template_kwargs"] = {"enable_thinking": thinks, "thinking": thinks}
    if body.output_config is not None:
        fields["reasoning_effort"] = body.output_config.effort
        if (wanted := body.output_config.format) is not None:
            schema = {"name": "answer", "schema": wanted.schema_, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields
