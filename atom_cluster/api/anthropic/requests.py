"""What clients send to /v1/messages and /v1/messages/count_tokens.

Content is text, tool calls and their results, and thinking; tools are those that the client runs. The rest is refused
by name. Knows nothing of chat requests; `api/anthropic/conversion.py` makes one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from atom_cluster.api.http.api_model import ApiModel, Unsupported
from atom_cluster.api.openai.chat_messages import MAX_NAME_CHARS, FunctionTitle
from atom_cluster.config.protection import MAX_PRIORITY


class CacheControl(ApiModel):
    """Accepted without effect: every prefix is cached and found by content."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None
    """Without effect."""


class TextBlock(ApiModel):
    """Text."""

    type: Literal["text"]
    text: str
    """The text."""
    cache_control: CacheControl | None = None
    """Without effect."""
    citations: Unsupported = None
    """Not supported."""


class ToolUseBlock(ApiModel):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    """What the block that answers it names."""
    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    """Of the tool."""
    input: dict[str, object]
    """What it was called with."""
    cache_control: CacheControl | None = None
    """Without effect."""
    caller: object = None
    """Accepted without effect."""


def _as_text_blocks(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


TextContent = Annotated[list[TextBlock], BeforeValidator(_as_text_blocks, json_schema_input_type=str | list[TextBlock])]
"""Text, or blocks of it."""


class ToolResultBlock(ApiModel):
    """What a call returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    """Of the call that it answers."""
    content: TextContent = Field(default_factory=list)
    """Text, or blocks of it."""
    is_error: bool | None = None
    """true: the model reads `Error: ` before the content."""
    cache_control: CacheControl | None = None
    """Without effect."""


class ThinkingBlock(ApiModel):
    """What the assistant thought. Given to the chat template with the turn it belongs to."""

    type: Literal["thinking"]
    thinking: str
    """The text."""
    signature: str | None = None
    """Accepted without effect: nothing is signed here."""


_BLOCK_TYPES = ("text", "tool_use", "tool_result", "thinking")


def _block_tag(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in _BLOCK_TYPES else None


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")],
    Discriminator(
        _block_tag,
        custom_error_type="content_block",
        custom_error_message=f"this server supports blocks of type {', '.join(_BLOCK_TYPES)}",
    ),
]


class MessageParam(ApiModel):
    """One turn of the conversation."""

    role: Literal["user", "assistant"]
    """Whose turn it is. Turns of one role that follow each other are one."""
    content: Annotated[
        list[Block],
        BeforeValidator(
            _as_text_blocks,
            json_schema_input_type=str | list[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock],
        ),
    ]
    """Text, or blocks."""


class ClientTool(ApiModel):
    """A function that the model may call and the client runs."""

    type: Literal["custom"] | None = None
    """Tools that the server would run are refused."""
    name: FunctionTitle
    """What the model calls it by."""
    description: str | None = None
    """What it does, for the model."""
    input_schema: dict[str, object]
    """JSON schema of the input."""
    strict: bool | None = None
    """Whether inputs have to conform to `input_schema`."""
    cache_control: CacheControl | None = None
    """Without effect."""
    eager_input_streaming: bool | None = None
    """Accepted without effect: input is streamed as it is written."""
    input_examples: Unsupported = None
    """Not supported."""
    defer_loading: Unsupported = None
    """Not supported."""
    allowed_callers: Unsupported = None
    """Not supported."""


class MessagesToolChoice(ApiModel):
    """Which tools may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    """auto: the model decides. any: it calls at least one. tool: it calls the named one. none: tools are not shown to
    it."""
    name: str | None = None
    """Of the tool, for the type `tool`."""
    disable_parallel_tool_use: bool | None = None
    """true: the output ends after its first call."""


class ThinkingConfig(ApiModel):
    """Whether the model thinks before it answers, if it can."""

    type: Literal["enabled", "disabled", "adaptive"]
    """disabled: it does not think. The other two: it does."""
    budget_tokens: int | None = Field(None, ge=1)
    """Accepted without effect: `max_tokens` bounds thinking and answer together."""
    display: Literal["summarized", "omitted"] | None = None
    """omitted: thinking is left out of the answer. summarized: it is sent as it is."""


class JsonFormat(ApiModel):
    """The answer is JSON that fits a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, object] = Field(alias="schema")
    """The JSON schema."""


class OutputConfig(ApiModel):
    """Options of the answer."""

    effort: str | None = None
    """Given to the chat template as `reasoning_effort`."""
    format: JsonFormat | None = None
    """What the answer has to look like."""


class Metadata(ApiModel):
    """Accepted without effect."""

    user_id: str | None = None
    """Without effect."""


class PromptFields(ApiModel):
    """What makes the prompt. Body of POST /v1/messages/count_tokens."""

    model: str
    """The served model's name."""
    messages: list[MessageParam] = Field(min_length=1)
    """The last one is the user's: an answer that continues the assistant's own text is not supported."""
    system: Annotated[
        list[TextBlock], BeforeValidator(_as_text_blocks, json_schema_input_type=str | list[TextBlock])
    ] = Field(default_factory=list)
    """Before everything else: text, or blocks of it."""
    tools: list[ClientTool] | None = None
    """Functions that the model may call."""
    tool_choice: MessagesToolChoice | None = None
    """Which of them it may or must call."""
    thinking: ThinkingConfig | None = None
    """Whether it thinks before it answers, if it can. If not given, as the model does."""
    output_config: OutputConfig | None = None
    """Options of the answer."""
    cache_control: CacheControl | None = None
    """Without effect."""


class MessagesRequest(PromptFields):
    """Body of POST /v1/messages."""

    max_tokens: int = Field(ge=1, le=2**63 - 1)
    """Most output tokens, thinking included."""
    temperature: float | None = Field(None, ge=0, le=1)
    """0 is greedy. If not given, what the model's authors recommend, else 1."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Keep the smallest set of tokens whose probabilities sum to at least this."""
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    """0 keeps all tokens."""
    stop_sequences: list[str] | None = None
    """Strings that end the output, which is cut before them."""
    stream: bool | None = None
    """Whether to send the answer as events, as it is generated."""
    metadata: Metadata | None = None
    """Without effect."""
    service_tier: Literal["auto", "standard_only"] | None = None
    """Accepted without effect: there is one tier."""
    container: Unsupported = None
    """Not supported."""
    context_management: Unsupported = None
    """Not supported."""
    mcp_servers: Unsupported = None
    """Not supported."""
    inference_geo: Unsupported = None
    """Not supported."""
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """Lower runs first; 0 is usual. Not Anthropic's."""
