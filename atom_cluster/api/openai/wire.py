"""What the API sends: OpenAI's answer objects, as msgspec structs because one is encoded per streamed token.

Field names and nesting are OpenAI's; the timings in `Usage` are additions. Knows nothing of how they come about.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

WireFinishReason = Literal["stop", "length", "tool_calls"]


class ErrorDetail(Struct, frozen=True, kw_only=True):
    """What went wrong."""

    message: str
    """For people."""
    type: str
    """Which class of errors it belongs to."""
    param: str | None
    """The field or header that is wrong."""
    code: str | None
    """Which error it is, for programs."""


class ErrorBody(Struct, frozen=True, kw_only=True):
    """Body of every answer with an error status, and of an error event within a stream."""

    error: ErrorDetail
    """What went wrong."""


class PromptTokensDetails(Struct, frozen=True, kw_only=True):
    """Part of `Usage`."""

    cached_tokens: int
    """Prompt tokens whose KV was found in a prefix cache."""


class CompletionTokensDetails(Struct, frozen=True, kw_only=True):
    """Part of `Usage`."""

    reasoning_tokens: int
    """Output tokens spent on reasoning, its closing mark included; counted whether or not reasoning is sent."""


class Usage(Struct, frozen=True, kw_only=True):
    """Counts and times of one answer."""

    prompt_tokens: int
    """Each prompt once, however many outputs it has."""
    completion_tokens: int
    """Of all outputs."""
    total_tokens: int
    """The sum of both."""
    prompt_tokens_details: PromptTokensDetails
    """Of the prompt tokens."""
    completion_tokens_details: CompletionTokensDetails
    """Of the output tokens."""
    ttft_s: float
    """Seconds from the request's arrival to its first output token."""
    tpot_s: float
    """Seconds per output token after the first, mean over outputs; 0 for single tokens."""
    latency_s: float
    """Seconds from the request's arrival to its last output token."""


class TopChatLogprob(Struct, frozen=True, kw_only=True):
    """One alternative at one position."""

    token: str
    """Its text; bytes that are no text are escaped."""
    logprob: float
    """Natural logarithm of its probability."""
    bytes: list[int]
    """Its text in UTF-8."""


class ChatTokenLogprob(Struct, frozen=True, kw_only=True):
    """One output token."""

    token: str
    """Its text; bytes that are no text are escaped."""
    logprob: float
    """Natural logarithm of its probability."""
    bytes: list[int]
    """Its text in UTF-8."""
    top_logprobs: list[TopChatLogprob]
    """Most likely first."""


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    """Log probabilities of a chat choice: one entry per output token, end-of-turn tokens included."""

    content: list[ChatTokenLogprob]
    """One per output token."""


class CompletionLogprobs(Struct, frozen=True, kw_only=True):
    """Log probabilities of a text choice: parallel lists with one entry per token of its text."""

    tokens: list[str]
    """Their texts; bytes that are no text are escaped."""
    token_logprobs: list[float | None]
    """Natural logarithms of their probabilities; null for the first token of a prompt."""
    top_logprobs: list[dict[str, float] | None]
    """Of the alternatives, by text; null for the first token of a prompt."""
    text_offset: list[int]
    """Where each token's text begins in the choice's text."""


class PromptTokenLogprob(Struct, frozen=True, kw_only=True):
    """One token that may follow the prompt's tokens before it: the prompt's own, or one of the most likely."""

    logprob: float
    """Natural logarithm of its probability."""
    rank: int
    """1 plus the number of tokens that are more likely in its place."""
    decoded_token: str
    """Its text; bytes that are no text are escaped."""


class FunctionCall(Struct, frozen=True, kw_only=True):
    """Which function a tool call calls."""

    name: str
    """Of the function."""
    arguments: str
    """JSON text, as the model wrote it: clients check it."""


class ToolCall(Struct, frozen=True, kw_only=True):
    """One tool call of an answer."""

    id: str
    """What the `tool` message that answers it names."""
    type: Literal["function"] = "function"
    function: FunctionCall
    """What is called."""


class FunctionCallDelta(Struct, frozen=True, kw_only=True):
    """News of a call: its name comes once, with empty arguments."""

    name: str | UnsetType = UNSET
    """Of the function."""
    arguments: str
    """More of the JSON text."""


class ToolCallDelta(Struct, frozen=True, kw_only=True):
    """News of one tool call; `id` and `type` come with its name."""

    index: int
    """Which of the output's calls, from 0."""
    id: str | UnsetType = UNSET
    """What the `tool` message that answers it names."""
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCallDelta
    """What is new of it."""


class AssistantMessage(Struct, frozen=True, kw_only=True):
    """The answer of a chat choice."""

    role: Literal["assistant"]
    content: str | None
    """null when there are tool calls and nothing else."""
    reasoning_content: str | UnsetType = UNSET
    """What the model thought, if it did."""
    tool_calls: list[ToolCall] | UnsetType = UNSET
    """The calls, if there are any."""


class MessageDelta(Struct, frozen=True, kw_only=True):
    """What a chunk adds to a chat choice."""

    role: Literal["assistant"] | UnsetType = UNSET
    """In the first chunk."""
    content: str | UnsetType = UNSET
    """More text."""
    reasoning_content: str | UnsetType = UNSET
    """More of what the model thought."""
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    """More of its calls."""


class ChatChoice(Struct, frozen=True, kw_only=True):
    """One output of a chat answer."""

    index: int
    """Which output, from 0."""
    message: AssistantMessage
    """What it says."""
    logprobs: ChatLogprobs | None
    """If asked for."""
    finish_reason: WireFinishReason
    """Why it ended."""


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    """News of one output in a streamed chat answer."""

    index: int
    """Which output, from 0."""
    delta: MessageDelta
    """What is new."""
    logprobs: ChatLogprobs | None
    """Of the new tokens, if asked for."""
    finish_reason: WireFinishReason | None
    """Why it ended; null until it does."""


class TextChoice(Struct, frozen=True, kw_only=True):
    """One output of a text answer, or news of it in a stream (then `finish_reason` may be None)."""

    index: int
    """Which output, from 0: those of the first prompt, then those of the second, and so on."""
    text: str
    """What it says, or adds."""
    logprobs: CompletionLogprobs | None
    """If asked for."""
    finish_reason: WireFinishReason | None
    """Why it ended; null in a stream until it does."""
    prompt_logprobs: list[dict[str, PromptTokenLogprob] | None] | UnsetType = UNSET
    """One entry per prompt token, by token id, if asked for; null for the first."""


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """Whole answer of /v1/chat/completions."""

    id: str
    """Of the answer."""
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Unix seconds."""
    model: str
    """The served model's name."""
    choices: list[ChatChoice]
    """The outputs."""
    usage: Usage
    """Counts and times."""
    prompt_logprobs: list[dict[str, PromptTokenLogprob] | None] | UnsetType = UNSET
    """One entry per prompt token, by token id, if asked for; null for the first."""


class ChatCompletionChunk(Struct, frozen=True, kw_only=True):
    """One event of a streamed chat answer. `usage`: absent unless asked for, null before the last chunk."""

    id: str
    """Of the answer."""
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    """Unix seconds."""
    model: str
    """The served model's name."""
    choices: list[ChatChunkChoice]
    """The output that has news; empty in the chunk with usage."""
    usage: Usage | UnsetType | None = UNSET
    """Counts and times."""


class Completion(Struct, frozen=True, kw_only=True):
    """Whole answer of /v1/completions, or one event of a streamed one."""

    id: str
    """Of the answer."""
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix seconds."""
    model: str
    """The served model's name."""
    choices: list[TextChoice]
    """The outputs, or the one that has news."""
    usage: Usage | UnsetType | None = UNSET
    """Counts and times."""


class TypedEvent(Struct, frozen=True, kw_only=True):
    """Base of the events of streams whose events have names."""

    type: str
    """The event's name."""


class ModelCard(Struct, frozen=True, kw_only=True):
    """One entry of /v1/models."""

    id: str
    """The model's name."""
    object: Literal["model"] = "model"
    created: int
    """Unix seconds."""
    max_model_len: int
    """Most tokens of prompt plus output."""
    owned_by: str = "atom_cluster"
    """Always the same."""


class ModelList(Struct, frozen=True, kw_only=True):
    """Answer of /v1/models."""

    data: list[ModelCard]
    """One model."""
    object: Literal["list"] = "list"
