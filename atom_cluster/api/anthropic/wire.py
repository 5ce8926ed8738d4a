"""What /v1/messages sends: Anthropic's message, its blocks, and the events of its streams.

Field names and nesting are Anthropic's. Knows nothing of how they come about.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from atom_cluster.api.openai.wire import TypedEvent

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnswerTextBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Text of the assistant."""

    text: str
    """The text."""


class AnswerThinkingBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    """What the model thought."""

    thinking: str
    """The text."""
    signature: str = ""
    """Empty: nothing is signed here."""


class AnswerToolUseBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    """A call for the client to run."""

    id: str
    """What the block that answers it names."""
    name: str
    """Of the tool."""
    input: dict[str, Any]
    """What to call it with."""


Block = AnswerTextBlock | AnswerThinkingBlock | AnswerToolUseBlock


class MessageUsage(Struct, frozen=True, kw_only=True):
    """Counts of one message. The prompt's tokens are the sum of the first two."""

    input_tokens: int
    """Prompt tokens that were computed."""
    cache_read_input_tokens: int
    """Prompt tokens whose KV was found in a prefix cache."""
    output_tokens: int
    """Thinking included."""


class MessageObject(Struct, frozen=True, kw_only=True):
    """The assistant's answer."""

    id: str
    """Of the message."""
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    """The served model's name."""
    content: list[Block]
    """Its blocks."""
    stop_reason: StopReason | None
    """Why it ended; null until it does."""
    stop_sequence: str | None
    """The stop sequence that ended the text, if one did."""
    usage: MessageUsage
    """Counts."""


class TokenCount(Struct, frozen=True, kw_only=True):
    """Answer of /v1/messages/count_tokens."""

    input_tokens: int
    """Tokens of the prompt."""


class MessageStart(TypedEvent, frozen=True, kw_only=True):
    """The message, without content yet."""

    type: Literal["message_start"] = "message_start"
    message: MessageObject
    """As it is now."""


class Ping(TypedEvent, frozen=True, kw_only=True):
    """Nothing has happened."""

    type: Literal["ping"] = "ping"


class BlockStart(TypedEvent, frozen=True, kw_only=True):
    """A block begins."""

    type: Literal["content_block_start"] = "content_block_start"
    index: int
    """Which block, from 0."""
    content_block: Block
    """As it is now."""


class TextBlockDelta(Struct, frozen=True, kw_only=True, tag_field="type", tag="text_delta"):
    """More text."""

    text: str
    """The new text."""


class ThinkingBlockDelta(Struct, frozen=True, kw_only=True, tag_field="type", tag="thinking_delta"):
    """More thinking."""

    thinking: str
    """The new text."""


class InputBlockDelta(Struct, frozen=True, kw_only=True, tag_field="type", tag="input_json_delta"):
    """More of a call's input, as JSON text."""

    partial_json: str
    """More of the JSON text."""


class BlockDelta(TypedEvent, frozen=True, kw_only=True):
    """A block grows."""

    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    """Which block, from 0."""
    delta: TextBlockDelta | ThinkingBlockDelta | InputBlockDelta
    """What is new."""


class BlockStop(TypedEvent, frozen=True, kw_only=True):
    """A block is complete."""

    type: Literal["content_block_stop"] = "content_block_stop"
    index: int
    """Which block, from 0."""


class StopDelta(Struct, frozen=True, kw_only=True):
    """How the message ends."""

    stop_reason: StopReason | None
    """Why it ended."""
    stop_sequence: str | None
    """The stop sequence that ended the text, if one did."""


class MessageEnd(TypedEvent, frozen=True, kw_only=True):
    """The message is complete."""

    type: Literal["message_delta"] = "message_delta"
    delta: StopDelta
    """How."""
    usage: MessageUsage | UnsetType = UNSET
    """Counts."""


class MessageStop(TypedEvent, frozen=True, kw_only=True):
    """The stream's last event."""

    type: Literal["message_stop"] = "message_stop"


STREAM_EVENTS = (
    MessageStart,
    Ping,
    BlockStart,
    BlockDelta,
    BlockStop,
    MessageEnd,
    MessageStop,
)
"""What the `data:` of an event may be."""
