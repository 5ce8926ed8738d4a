"""Turns of a conversation and tools, as clients of /v1/chat/completions send them. Knows nothing of templates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from atom_cluster.api.http.api_model import ApiModel, Unsupported, joined_parts

MAX_NAME_CHARS = 128
FunctionTitle = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS, pattern=r"^[a-zA-Z0-9_.-]+$")]
"""What a function is called by."""


class FunctionDefinition(ApiModel):
    """A function that the model may call."""

    name: FunctionTitle
    """What the model calls it by."""
    description: str | None = None
    """What it does, for the model."""
    parameters: dict[str, object] | None = None
    """JSON schema of its arguments, an object."""
    strict: bool | None = None
    """Whether arguments have to conform to `parameters`."""


class Tool(ApiModel):
    """One of the request's tools. Functions are the only kind: the server runs none itself."""

    type: Literal["function"]
    function: FunctionDefinition
    """The function."""


class FunctionName(ApiModel):
    """Part of `NamedTool`."""

    name: str
    """Of one of `tools`."""


class NamedTool(ApiModel):
    """The one tool that has to be called."""

    type: Literal["function"]
    function: FunctionName
    """Which one."""


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def parse_tool_choice(value: object) -> object:
    """Say what is expected: a union's own errors name its cases, which clients do not write."""
    if value is None or value in ("none", "auto", "required"):
        return value
    is_named = isinstance(value, dict) and value.keys() == {"type", "function"} and value["type"] == "function"
    function = value["function"] if is_named and isinstance(value, dict) else None
    if isinstance(function, dict) and function.keys() == {"name"} and isinstance(function["name"], str):
        return value
    raise PydanticCustomError(
        "tool_choice",
        'expected "none", "auto", "required" or {example}',
        {"example": '{"type": "function", "function": {"name": "..."}}'},
    )


class CalledFunction(ApiModel):
    """Part of `PastToolCall`."""

    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    """Of the function that was called."""
    arguments: str
    """JSON text, as the answer had it."""
    parsed_arguments: object = None
    """Accepted without effect: OpenAI's client leaves there what it has read in `arguments`."""


class ContentPart(ApiModel):
    """A part of a turn's content."""

    type: Literal["text"]
    text: str
    """The text. Parts are joined by line ends."""


class PastToolCall(ApiModel):
    """A call that the assistant made in an earlier turn."""

    id: str
    """What the `tool` message that answers it names."""
    type: Literal["function"] = "function"
    function: CalledFunction
    """What was called."""
    index: int | None = None
    """Accepted without effect: clients that put streamed calls together leave it in."""


class ChatMessage(ApiModel):
    """One turn of the conversation. Clients send assistant turns back as they got them, hence the empty fields."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """`developer` is another name of `system`."""
    tool_calls: list[PastToolCall] | None = None
    """Of an assistant's earlier turn."""
    tool_call_id: str | None = Field(None, validate_default=True)
    """Of a tool's turn: which call it answers."""
    content: Annotated[
        str | None, BeforeValidator(joined_parts, json_schema_input_type=str | list[ContentPart] | None)
    ] = Field(None, validate_default=True)
    """May only be left out of an assistant's turn that has `tool_calls`."""
    name: str | None = None
    """Given to the chat template."""
    reasoning_content: str | None = None
    """Of an assistant's earlier turn. Given to the chat template, which leaves it out where the model wants that."""
    reasoning: str | None = None
    """vLLM's newer name of `reasoning_content`, which wins."""
    refusal: Unsupported = None
    """Not supported."""
    annotations: Unsupported = None
    """Not supported."""
    audio: Unsupported = None
    """Not supported."""
    function_call: Unsupported = None
    """Not supported."""
    parsed: object = None
    """Accepted without effect: OpenAI's client leaves there what it has read in `content`."""

    # Each field knows those above it. An entry that is absent was wrong, which is told already.

    @field_validator("tool_calls")
    @classmethod
    def _only_assistants_call(cls, value: object, info: ValidationInfo) -> object:
        if value and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("tool_calls", 'only a message of role "assistant" has it')
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _tools_answer_a_call(cls, value: object, info: ValidationInfo) -> object:
        if "role" in info.data and (value is not None) != (info.data["role"] == "tool"):
            raise PydanticCustomError("tool_call_id", 'a message of role "tool" needs it, and no other has it')
        return value

    @field_validator("content")
    @classmethod
    def _turns_have_content(cls, value: object, info: ValidationInfo) -> object:
        if value is None and not info.data.get("tool_calls", True):
            raise PydanticCustomError("content", "expected text")
        return value
