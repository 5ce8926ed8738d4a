"""What clients send to /v1/chat/completions and /v1/completions.

Fields are declared here or refused by name. Values are taken strictly: `"5"` or `5.0` is no integer. `null` means
"not given" everywhere, as some clients send it for what they leave out. Limits that depend on the configuration are in
`api/openai/sampling.py`. Knows nothing of HTTP or engines.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from atom_cluster.api.http.api_model import ApiModel, Unsupported
from atom_cluster.api.openai.chat_messages import ChatMessage, Tool, ToolChoice, parse_tool_choice
from atom_cluster.api.openai.structured_fields import StructuredFields
from atom_cluster.config.protection import MAX_PRIORITY

Prompt = str | tuple[int, ...]
"""Text, or token ids."""

MAX_STOP_TOKEN_IDS = 256
_INT64_MAX = 2**63 - 1


def _one_or_many_strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


_StopString = Annotated[str, Field(min_length=1)]


def _not_empty(values: list[str] | None) -> list[str] | None:
    if values and "" in values:
        raise PydanticCustomError("empty_string", "an empty string cannot be a stop string")
    return values


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


_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Texts = Annotated[list[str], Field(min_length=1)]
_PromptInput = str | _Texts | _TokenIds | Annotated[list[_TokenIds], Field(min_length=1)]


def _are_all(values: list[object], kind: type) -> bool:
    """Exact types: `true` is no token id."""
    return set(map(type, values)) == {kind}


class StreamOptions(ApiModel):
    """Details of a streamed answer."""

    include_usage: bool | None = None
    """Send a last chunk with token counts."""
    include_obfuscation: bool | None = None
    """Accepted without effect: padding against traffic analysis is not added."""


class GenerationFields(StructuredFields):
    """What both endpoints have in common."""

    model: str
    """The served model's name."""
    n: int | None = Field(None, ge=1)
    """Outputs per prompt; 1 if not given."""
    stream: bool | None = None
    """Whether to send the answer as events, as it is generated."""
    stream_options: StreamOptions | None = None
    """Goes with `stream`."""
    max_tokens: int | None = Field(None, ge=0, le=_INT64_MAX)
    """Most output tokens; 0 goes with `prompt_logprobs` or `echo` only. If not given, what the context leaves, or the
    server's configured number."""
    min_tokens: int | None = Field(None, ge=0, le=_INT64_MAX)
    """End tokens are not sampled before this many output tokens."""
    temperature: float | None = Field(None, ge=0, le=100)
    """0 is greedy. If not given, what the model's authors recommend, else 1."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Keep the smallest set of tokens whose probabilities sum to at least this."""
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    """-1 and 0 keep all tokens."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Drop tokens less likely than this times the most likely one."""
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    """Divides or multiplies the logits of tokens seen in prompt or output; 1 is none."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted from the logits of tokens seen in the output."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted, per occurrence in the output, from logits."""
    prompt_logprobs: int | None = Field(None, ge=0)
    """Send the log probability and rank of each prompt token, and of so many of the most likely ones in its place; not
    in streams."""
    seed: int | None = Field(None, ge=-(2**63), le=_INT64_MAX)
    """The i-th output of a prompt uses seed + i. A random one if not given."""
    stop: Annotated[
        list[str] | None,
        BeforeValidator(_one_or_many_strings, json_schema_input_type=_StopString | list[_StopString] | None),
        AfterValidator(_not_empty),
    ] = None
    """Strings that end the output, which is cut before them."""
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    """Further tokens that end the output."""
    ignore_eos: bool | None = None
    """Whether to go on behind the model's end tokens."""
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """Lower runs first; 0 is usual. Wins over the header `X-Request-Priority`."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """Token ids, as JSON wants keys to be, and what is added to their logits."""
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


class ThinkingControl(ApiModel):
    """Whether the model thinks before it answers, if it can."""

    type: Literal["enabled", "disabled"]
    """Told to templates that can switch reasoning on and off."""
    effort: str | None = Field(None, max_length=64)
    """As `reasoning_effort`, which wins."""
    keep: Unsupported = None
    """Not supported: what of earlier turns' reasoning stays is up to the chat template."""


class ChatCompletionRequest(GenerationFields):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    """The conversation so far."""
    max_completion_tokens: int | None = Field(None, ge=1, le=_INT64_MAX)
    """Newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Whether to send log probabilities of output tokens."""
    top_logprobs: int | None = Field(None, ge=0)
    """How many alternatives to each token. Goes with `logprobs`."""
    chat_template_kwargs: dict[str, object] | None = None
    """Variables for the model's chat template."""
    reasoning_effort: str | None = Field(None, max_length=64)
    """Given to the chat template as a variable of that name. Templates that can switch reasoning on and off are told,
    too: "none" is off, anything else is on."""
    thinking: ThinkingControl | None = None
    """ATOM's way to say the same."""
    include_reasoning: bool | None = None
    """False: reasoning is left out of the answer. It is generated and counted all the same."""
    modalities: Annotated[object, AfterValidator(_text_only), WithJsonSchema({"enum": [None, ["text"]]})] = None
    """Only `["text"]`."""
    tools: list[Tool] | None = None
    """Functions that the model may call."""
    tool_choice: Annotated[ToolChoice | None, BeforeValidator(parse_tool_choice)] = None
    """"auto", as if not given: the model decides. "none": `tools` are not shown to it. "required": it calls at least
    one. A named tool: it calls that one, once."""
    parallel_tool_calls: bool | None = None
    """False: the output ends after its first call."""


class CompletionRequest(GenerationFields):
    """Body of POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_parse_prompts, json_schema_input_type=_PromptInput)]
    """Text or token ids, or a list of either."""
    logprobs: int | None = Field(None, ge=0)
    """Send log probabilities of output tokens, and so many alternatives to each; with `echo`, of the prompt's too."""
    best_of: int | None = Field(None, ge=1)
    """Only equal to `n`: outputs are not ranked."""
    echo: bool | None = None
    """Whether outputs begin with their prompt."""
    suffix: Unsupported = None
    """Not supported."""
