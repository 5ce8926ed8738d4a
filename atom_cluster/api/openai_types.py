"""What clients send to /v1/chat/completions and /v1/completions.

Fields are declared here or refused by name. Values are taken strictly: `"5"` or `5.0` is no integer. `null` means
"not given" everywhere, as some clients send it for what they leave out. Limits that depend on the configuration are in
`api/sampling.py`. Knows nothing of HTTP or engines.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

Prompt = str | tuple[int, ...]
"""Text, or token ids."""

MAX_STOP_TOKEN_IDS = 256
_INT64_MAX = 2**63 - 1


class ApiModel(BaseModel):
    """Base of all request models."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _refuse(value: object) -> object:
    if value is None or value is False or value in ("", [], {}):
        return value
    raise PydanticCustomError("unsupported", "this server does not support it")


Unsupported = Annotated[object, AfterValidator(_refuse)]
"""A field whose meaning the server cannot honour: anything but an empty value is an error that names it."""


def _one_or_many_strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _not_empty(values: list[str] | None) -> list[str] | None:
    if values and "" in values:
        raise PydanticCustomError("empty_string", "an empty string cannot be a stop string")
    return values


def _joined_parts(value: object) -> object:
    """Message content as text: a string, or text parts joined by line ends."""
    if not isinstance(value, list):
        return value
    return "\n".join(_part_text(part, index) for index, part in enumerate(value))


def _part_text(part: object, index: int) -> str:
    if not isinstance(part, dict):
        raise PydanticCustomError("content_part", "part {index} is not an object", {"index": index})
    kind = part.get("type")
    if kind != "text":
        raise PydanticCustomError(
            "content_part",
            'part {index} has type {kind}; this server supports only "text"',
            {"index": index, "kind": repr(kind)[:40]},
        )
    text = part.get("text")
    if not isinstance(text, str) or part.keys() - {"type", "text"}:
        raise PydanticCustomError("content_part", 'part {index} must have exactly "type" and "text"', {"index": index})
    return text


def _parse_prompts(value: object) -> tuple[Prompt, ...]:
    """One prompt or several; text or token ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("prompt", "expected a string, strings, token ids or lists of token ids; not empty")
    if _are_all(value, int):
        return (tuple(value),)
    if _are_all(value, str):
        return tuple(value)
    for index, ids in enumerate(value):
        if not isinstance(ids, list) or not ids or not _are_all(ids, int):
            raise PydanticCustomError(
                "prompt", "element {index} is not a list of token ids like the others, or is empty", {"index": index}
            )
    return tuple(tuple(ids) for ids in value)


def _are_all(values: list[object], kind: type) -> bool:
    """Exact types: `true` is no token id."""
    return set(map(type, values)) == {kind}


class StreamOptions(ApiModel):
    """Details of a streamed answer."""

    include_usage: bool | None = None
    """Send a last chunk with token counts."""
    include_obfuscation: bool | None = None
    """Accepted without effect: padding against traffic analysis is not added."""


class TextResponseFormat(ApiModel):
    """The only answer format: plain text."""

    type: Literal["text"]


class GenerationFields(ApiModel):
    """What both endpoints have in common."""

    model: str
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=_INT64_MAX)
    min_tokens: int | None = Field(None, ge=0, le=_INT64_MAX)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    """-1 and 0 keep all tokens."""
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=_INT64_MAX)
    stop: Annotated[list[str] | None, BeforeValidator(_one_or_many_strings), AfterValidator(_not_empty)] = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool | None = None
    logit_bias: Unsupported = None
    user: object = None
    """Accepted without effect."""
    metadata: object = None
    """Accepted without effect."""
    store: object = None
    """Accepted without effect: nothing is stored."""
    service_tier: object = None
    """Accepted without effect: there is one tier."""
    safety_identifier: object = None
    """Accepted without effect."""
    prompt_cache_key: object = None
    """Accepted without effect: prefixes are found by content."""


def _text_only(value: object) -> object:
    if value not in (None, ["text"]):
        raise PydanticCustomError("unsupported", 'this server supports only ["text"]')
    return value


def _no_tool_choice(value: object) -> object:
    if value not in (None, "none", "auto"):
        raise PydanticCustomError("unsupported", "this server does not support tools")
    return value


class ChatMessage(ApiModel):
    """One turn of the conversation. Clients send assistant turns back as they got them, hence the empty fields."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is another name of `system`."""
    content: Annotated[str, BeforeValidator(_joined_parts)]
    name: str | None = None
    """Given to the chat template."""
    reasoning_content: str | None = None
    """Given to the chat template."""
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None


class ChatCompletionRequest(GenerationFields):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT64_MAX)
    """Newer name of `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    chat_template_kwargs: dict[str, object] | None = None
    """Variables for the model's chat template."""
    reasoning_effort: str | None = None
    """Given to the chat template as a variable of that name."""
    response_format: TextResponseFormat | None = None
    modalities: Annotated[object, AfterValidator(_text_only)] = None
    tools: Unsupported = None
    tool_choice: Annotated[object, AfterValidator(_no_tool_choice)] = None
    parallel_tool_calls: object = None
    """Accepted without effect: there are no tools."""


class CompletionRequest(GenerationFields):
    """Body of POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_parse_prompts)]
    logprobs: int | None = Field(None, ge=0)
    best_of: int | None = Field(None, ge=1)
    """Only equal to `n`: outputs are not ranked."""
    echo: Unsupported = None
    suffix: Unsupported = None
