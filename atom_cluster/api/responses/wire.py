"""What /v1/responses sends: OpenAI's response object, its items, and the events of its streams.

Field names and nesting are OpenAI's. Knows nothing of how they come about.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from atom_cluster.api.openai.wire import ChatTokenLogprob, TypedEvent

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]
ResponseEventKind = Literal[
    "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
]
ItemEventKind = Literal["response.output_item.added", "response.output_item.done"]
PartEventKind = Literal["response.content_part.added", "response.content_part.done"]


class OutputText(Struct, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    """The one part of a message."""

    text: str
    """The text."""
    annotations: list[Any] = []
    """Empty: nothing is looked up that could be cited."""
    logprobs: list[ChatTokenLogprob] = []
    """If asked for: of all output tokens, those of reasoning included; in a stream without those of calls behind the
    last text, which have no place there."""


class ReasoningTextPart(Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning_text"):
    """The one part of a reasoning item."""

    text: str
    """The text."""


class MessageOutput(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """Text of the assistant."""

    id: str
    """Of the item."""
    status: ItemStatus
    """incomplete: `max_output_tokens` cut it off."""
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]
    """One part; none when it has only begun."""


class ReasoningOutput(Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought."""

    id: str
    """Of the item."""
    status: ItemStatus
    """incomplete: `max_output_tokens` cut it off."""
    summary: list[Any] = []
    """Empty: the reasoning itself is in `content`."""
    content: list[ReasoningTextPart]
    """One part; none when it has only begun."""


class FunctionCallOutput(Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A call for the client to run."""

    id: str
    """Of the item."""
    status: ItemStatus
    """incomplete: `max_output_tokens` cut it off."""
    call_id: str
    """What the item that answers it names."""
    name: str
    """Of the function."""
    arguments: str
    """JSON text, as the model wrote it: clients check it."""


OutputItem = MessageOutput | ReasoningOutput | FunctionCallOutput


class InputTokensDetails(Struct, frozen=True, kw_only=True):
    """Part of `ResponseUsage`."""

    cached_tokens: int
    """Prompt tokens whose KV was found in a prefix cache."""


class OutputTokensDetails(Struct, frozen=True, kw_only=True):
    """Part of `ResponseUsage`."""

    reasoning_tokens: int
    """Output tokens spent on reasoning."""


class ResponseUsage(Struct, frozen=True, kw_only=True):
    """Counts of one response."""

    input_tokens: int
    """Tokens of the prompt."""
    input_tokens_details: InputTokensDetails
    """Of the prompt tokens."""
    output_tokens: int
    """Reasoning included."""
    output_tokens_details: OutputTokensDetails
    """Of the output tokens."""
    total_tokens: int
    """The sum of both."""


class IncompleteDetails(Struct, frozen=True, kw_only=True):
    """Why a response ends early."""

    reason: Literal["max_output_tokens"]
    """The only one there is."""


class ResponseError(Struct, frozen=True, kw_only=True):
    """Why a response failed after it had begun."""

    code: str
    """Which error it is, for programs."""
    message: str
    """For people."""


class ResponseObject(Struct, frozen=True, kw_only=True):
    """A response: what was asked for, and what came out."""

    id: str
    """Of the response."""
    object: Literal["response"] = "response"
    created_at: int
    """Unix seconds."""
    status: ResponseStatus
    """What became of it."""
    error: ResponseError | None = None
    """If it failed."""
    incomplete_details: IncompleteDetails | None = None
    """If it is incomplete."""
    instructions: str | None
    """As requested."""
    max_output_tokens: int | None
    """As requested."""
    model: str
    """The served model's name."""
    output: list[OutputItem]
    """Its items."""
    parallel_tool_calls: bool
    """As requested, or true."""
    previous_response_id: None = None
    """Nothing is stored."""
    reasoning: dict[str, Any]
    """As requested."""
    store: Literal[False] = False
    """Nothing is stored."""
    background: Literal[False] = False
    """Nothing is stored."""
    temperature: float
    """The one that was used: the request's, else the model's."""
    text: dict[str, Any]
    """As requested."""
    tool_choice: str | dict[str, Any]
    """As requested, or auto."""
    tools: list[dict[str, Any]]
    """As requested."""
    top_logprobs: int
    """As requested, or 0."""
    top_p: float
    """The one that was used: the request's, else the model's."""
    truncation: Literal["disabled"] = "disabled"
    """The only kind there is."""
    usage: ResponseUsage | None
    """null until the response is over."""
    metadata: dict[str, str]
    """As requested."""


class _Event(TypedEvent, frozen=True, kw_only=True):
    sequence_number: int
    """0, 1, 2, ... within the stream."""


class ResponseEvent(_Event, frozen=True, kw_only=True):
    """The response as a whole begins or ends."""

    type: ResponseEventKind
    response: ResponseObject
    """As it is now."""


class OutputItemEvent(_Event, frozen=True, kw_only=True):
    """An item begins or is done."""

    type: ItemEventKind
    output_index: int
    """Which of the response's items, from 0."""
    item: OutputItem
    """As it is now."""


class _PartOfItem(_Event, frozen=True, kw_only=True):
    item_id: str
    """Of the item."""
    output_index: int
    """Which of the response's items, from 0."""


class ContentPartEvent(_PartOfItem, frozen=True, kw_only=True):
    """A message's or a reasoning item's part begins or is done."""

    type: PartEventKind
    content_index: int = 0
    """Items have one part."""
    part: OutputText | ReasoningTextPart
    """As it is now."""


class TextDeltaEvent(_PartOfItem, frozen=True, kw_only=True):
    """More text."""

    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    content_index: int = 0
    """Items have one part."""
    delta: str
    """The new text."""
    logprobs: list[ChatTokenLogprob]
    """Of the new tokens, if asked for."""


class TextDoneEvent(_PartOfItem, frozen=True, kw_only=True):
    """All of a message's text."""

    type: Literal["response.output_text.done"] = "response.output_text.done"
    content_index: int = 0
    """Items have one part."""
    text: str
    """All of it."""
    logprobs: list[ChatTokenLogprob]
    """Of all tokens, if asked for."""


class ReasoningDeltaEvent(_PartOfItem, frozen=True, kw_only=True):
    """More reasoning."""

    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"
    content_index: int = 0
    """Items have one part."""
    delta: str
    """The new text."""


class ReasoningDoneEvent(_PartOfItem, frozen=True, kw_only=True):
    """All of an item's reasoning."""

    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"
    content_index: int = 0
    """Items have one part."""
    text: str
    """All of it."""


class ArgumentsDeltaEvent(_PartOfItem, frozen=True, kw_only=True):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    delta: str
    """More of the JSON text."""


class ArgumentsDoneEvent(_PartOfItem, frozen=True, kw_only=True):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    name: str
    """Of the function."""
    arguments: str
    """The JSON text."""


STREAM_EVENTS = (
    ResponseEvent,
    OutputItemEvent,
    ContentPartEvent,
    TextDeltaEvent,
    TextDoneEvent,
    ReasoningDeltaEvent,
    ReasoningDoneEvent,
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
)
"""What the `data:` of an event may be."""
