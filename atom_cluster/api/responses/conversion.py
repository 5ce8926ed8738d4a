"""A request to /v1/responses becomes the chat request that means the same."""

from __future__ import annotations

from collections.abc import Iterable

from atom_cluster.api.http.field_names import fields_named
from atom_cluster.api.http.request_body import validate
from atom_cluster.api.openai.requests import ChatCompletionRequest
from atom_cluster.api.responses.requests import (
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionTool,
    InputItem,
    InputText,
    MessageItem,
    NamedFunction,
    ReasoningItem,
    RefusalPart,
    ResponsesRequest,
    ResponseTextFormat,
)
from atom_cluster.errors import InvalidRequest

LOGPROBS = "message.output_text.logprobs"
FIELD_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
    ".function": "",
}
"""What chat requests call a field, and what clients of /v1/responses do."""
_SAME = (
    "model",
    "parallel_tool_calls",
    "temperature",
    "top_p",
    "stream",
    "priority",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "min_tokens",
    "chat_template_kwargs",
)


def chat_request(body: ResponsesRequest) -> ChatCompletionRequest:
    """The chat request. Raises `InvalidRequest` that names the client's field."""
    has_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs and not has_logprobs:
        raise InvalidRequest(f"`top_logprobs` needs `include` to have {LOGPROBS}", param="top_logprobs")
    fields: dict[str, object] = {name: getattr(body, name) for name in _SAME}
    fields |= {
        "messages": [*_instructions(body.instructions), *_messages(body.input)],
        "max_tokens": body.max_output_tokens,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": _tool_choice(body.tool_choice),
        "response_format": _response_format(body.text.format if body.text else None),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "logprobs": True if has_logprobs else None,
        "top_logprobs": body.top_logprobs if has_logprobs else None,
    }
    with fields_named(FIELD_NAMES):
        return validate(ChatCompletionRequest, {name: value for name, value in fields.items() if value is not None})


def _instructions(text: str | None) -> list[dict[str, object]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _messages(items: Iterable[InputItem]) -> list[dict[str, object]]:
    """Items of one assistant's turn (its reasoning, its text, its calls) become one message."""
    messages: list[dict[str, object]] = []
    turn: dict[str, object] | None = None
    for item in items:
        if isinstance(item, FunctionCallOutputItem):
            turn = None
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            turn = None
            messages.append({"role": item.role, "content": _text(item.content)})
        else:
            if turn is None or not _continues(turn, item):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _add_to_turn(turn, item)
    return messages


def _continues(turn: dict[str, object], item: MessageItem | FunctionCallItem | ReasoningItem) -> bool:
    """Whether an item belongs to the turn before it: text does not follow calls, nor text or reasoning text."""
    if isinstance(item, FunctionCallItem):
        return True
    return not turn["content"] and "tool_calls" not in turn


def _add_to_turn(turn: dict[str, object], item: MessageItem | FunctionCallItem | ReasoningItem) -> None:
    if isinstance(item, MessageItem):
        turn["content"] = _text(item.content)
    elif isinstance(item, ReasoningItem):
        texts = [part.text for part in item.content or item.summary]
        turn["reasoning_content"] = str(turn.get("reasoning_content", "")) + "".join(texts)
    else:
        calls = turn.setdefault("tool_calls", [])
        assert isinstance(calls, list)
        function = {"name": item.name, "arguments": item.arguments}
        calls.append({"id": item.call_id, "type": "function", "function": function})


def _text(parts: Iterable[InputText | RefusalPart]) -> str:
    return "\n".join(part.text if isinstance(part, InputText) else part.refusal for part in parts)


def _tool(tool: FunctionTool) -> dict[str, object]:
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _tool_choice(choice: str | NamedFunction | None) -> object:
    if isinstance(choice, NamedFunction):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _response_format(wanted: ResponseTextFormat | None) -> object:
    if wanted is None or wanted.type != "json_schema":
        return None if wanted is None else {"type": wanted.type}
    if wanted.name is None or wanted.schema_ is None:
        raise InvalidRequest("`text.format` needs `name` and `schema`", param="text.format")
    return {
        "type": "json_schema",
        "json_schema": wanted.model_dump(by_alias=True, exclude={"type"}, exclude_none=True),
    }
