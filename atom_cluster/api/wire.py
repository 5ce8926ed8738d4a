"""What the API sends: OpenAI's answer objects, as msgspec structs because one is encoded per streamed token.

Field names and nesting are OpenAI's; the timings in `Usage` are additions. Knows nothing of how they come about.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

WireFinishReason = Literal["stop", "length"]


class ErrorDetail(Struct, frozen=True, kw_only=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct, frozen=True, kw_only=True):
    """Body of every answer with an error status, and of an error event within a stream."""

    error: ErrorDetail


class PromptTokensDetails(Struct, frozen=True, kw_only=True):
    """Part of `Usage`."""

    cached_tokens: int
    """Prompt tokens whose KV was found in a prefix cache."""


class Usage(Struct, frozen=True, kw_only=True):
    """Counts and times of one answer."""

    prompt_tokens: int
    """Each prompt once, however many outputs it has."""
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    ttft_s: float
    """Seconds from the request's arrival to its first output token."""
    tpot_s: float
    """Seconds per output token after the first, mean over outputs; 0 for single tokens."""
    latency_s: float
    """Seconds from the request's arrival to its last output token."""


class TopChatLogprob(Struct, frozen=True, kw_only=True):
    """One alternative at one position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct, frozen=True, kw_only=True):
    """One output token."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopChatLogprob]


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    """Log probabilities of a chat choice: one entry per output token, end-of-turn tokens included."""

    content: list[ChatTokenLogprob]


class CompletionLogprobs(Struct, frozen=True, kw_only=True):
    """Log probabilities of a text choice: parallel lists with one entry per output token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Where each token's text begins in the choice's text."""


class AssistantMessage(Struct, frozen=True, kw_only=True):
    """The answer of a chat choice."""

    role: Literal["assistant"]
    content: str


class MessageDelta(Struct, frozen=True, kw_only=True):
    """What a chunk adds to a chat choice."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(Struct, frozen=True, kw_only=True):
    """One output of a chat answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: WireFinishReason


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    """News of one output in a streamed chat answer."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: WireFinishReason | None


class TextChoice(Struct, frozen=True, kw_only=True):
    """One output of a text answer, or news of it in a stream (then `finish_reason` may be None)."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: WireFinishReason | None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """Whole answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(Struct, frozen=True, kw_only=True):
    """One event of a streamed chat answer. `usage`: absent unless asked for, null before the last chunk."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class Completion(Struct, frozen=True, kw_only=True):
    """Whole answer of /v1/completions, or one event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct, frozen=True, kw_only=True):
    """One entry of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    max_model_len: int
    owned_by: str = "atom_cluster"


class ModelList(Struct, frozen=True, kw_only=True):
    """Answer of /v1/models."""

    data: list[ModelCard]
    object: Literal["list"] = "list"
