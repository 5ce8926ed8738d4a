"""What clients send to /v1/responses.

Nothing is stored here, so what needs a store is refused by name, and so are tools that the server would have to run.
Knows nothing of chat requests; `api/responses/conversion.py` makes one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from atom_cluster.api.http.api_model import ApiModel, Unsupported
from atom_cluster.api.openai.chat_messages import MAX_NAME_CHARS, FunctionTitle
from atom_cluster.config.protection import MAX_PRIORITY

_NO_STORE = "this server stores nothing"


def _needs_a_store(value: object) -> object:
    if value is None or value is False:
        return value
    raise PydanticCustomError("unsupported", _NO_STORE)


NeedsStore = Annotated[object, AfterValidator(_needs_a_store), Field(json_schema_extra={"enum": [None, False]})]
"""A field that only a server with a store could honour: true, or any other value, is an error that names it."""


class InputText(ApiModel):
    """A part of content: text."""

    type: Literal["input_text", "output_text"]
    """Of users and of assistants; they are taken alike."""
    text: str
    """The text."""
    annotations: Unsupported = None
    """Accepted if empty."""
    logprobs: object = None
    """Accepted without effect: clients send output back as they got it."""


class RefusalPart(ApiModel):
    """A part of an assistant's content that says why it does not answer."""

    type: Literal["refusal"]
    refusal: str
    """The text."""


def _part_tag(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"input_text": "<text>", "output_text": "<text>", "refusal": "<refusal>"}.get(str(kind))


ContentPart = Annotated[
    Annotated[InputText, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(
        _part_tag,
        custom_error_type="content_part",
        custom_error_message='this server supports only "input_text", "output_text" and "refusal"',
    ),
]


def _as_parts(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


Content = Annotated[
    list[ContentPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[InputText | RefusalPart])
]
"""Text, or parts of it."""


class MessageItem(ApiModel):
    """One turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    """Whose turn it is. `developer` is another name of `system`."""
    content: Content
    """Text, or parts of it."""
    id: str | None = None
    """Accepted without effect."""
    status: str | None = None
    """Accepted without effect."""
    phase: str | None = None
    """Accepted without effect."""


class FunctionCallItem(ApiModel):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: str
    """What the item that answers it names."""
    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    """Of the function."""
    arguments: str
    """JSON text."""
    id: str | None = None
    """Accepted without effect."""
    status: str | None = None
    """Accepted without effect."""


class FunctionCallOutputItem(ApiModel):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: str
    """Of the call that it answers."""
    output: Content
    """Text, or parts of it."""
    id: str | None = None
    """Accepted without effect."""
    status: str | None = None
    """Accepted without effect."""


class SummaryText(ApiModel):
    """A part of a reasoning item's summary."""

    type: Literal["summary_text"]
    text: str
    """The text."""


class ReasoningText(ApiModel):
    """A part of a reasoning item."""

    type: Literal["reasoning_text"]
    text: str
    """The text."""


class ReasoningItem(ApiModel):
    """What the assistant thought before the turn or call that follows. Given to the chat template with that turn."""

    type: Literal["reasoning"]
    id: str | None = None
    """Accepted without effect."""
    summary: list[SummaryText] = Field(default_factory=list)
    """Used where there is no content."""
    content: list[ReasoningText] | None = None
    """The reasoning itself."""
    encrypted_content: Unsupported = None
    """Not supported."""
    status: str | None = None
    """Accepted without effect."""


_ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


def _item_tag(value: object) -> str | None:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in _ITEM_TYPES else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(
        _item_tag,
        custom_error_type="input_item",
        custom_error_message=f"this server stores nothing and runs no tools: items are {', '.join(_ITEM_TYPES)}",
    ),
]


def _as_items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class FunctionTool(ApiModel):
    """A function that the model may call and the client runs."""

    type: Literal["function"]
    """Tools that the server would run (web_search, file_search, code_interpreter, mcp, ...) are refused."""
    name: FunctionTitle
    """What the model calls it by."""
    description: str | None = None
    """What it does, for the model."""
    parameters: dict[str, object] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None
    """Whether arguments have to conform to `parameters`."""


class NamedFunction(ApiModel):
    """The one tool that is to be called."""

    type: Literal["function"]
    name: str
    """Of one of `tools`."""


class ResponseTextFormat(ApiModel):
    """What the answer's text looks like."""

    type: Literal["text", "json_object", "json_schema"]
    """text: any. json_object: any JSON object. json_schema: JSON that `schema` accepts."""
    name: str | None = None
    """Of the schema."""
    description: str | None = None
    """Without effect."""
    schema_: dict[str, object] | None = Field(None, alias="schema")
    """The JSON schema, for that type."""
    strict: bool | None = None
    """false: keywords of the schema that cannot be enforced are ignored; otherwise they are errors."""


class TextConfig(ApiModel):
    """Options of the answer's text."""

    format: ResponseTextFormat | None = None
    """What it has to look like."""
    verbosity: Literal["medium"] | None = None
    """Accepted without effect; other values are refused: the model is not told."""


class ReasoningConfig(ApiModel):
    """Options of reasoning."""

    effort: str | None = None
    """Given to the chat template as `reasoning_effort`."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted without effect: answers contain the reasoning itself."""


class ResponseStreamOptions(ApiModel):
    """Details of a streamed answer."""

    include_obfuscation: bool | None = None
    """Accepted without effect: padding against traffic analysis is not added."""


class ResponsesRequest(ApiModel):
    """Body of POST /v1/responses."""

    model: str
    """The served model's name."""
    input: Annotated[
        list[InputItem],
        Field(min_length=1),
        BeforeValidator(
            _as_items,
            json_schema_input_type=str
            | Annotated[
                list[MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem], Field(min_length=1)
            ],
        ),
    ]
    """Text of one user's turn, or the items of the conversation."""
    instructions: str | None = None
    """A system message before everything else."""
    tools: list[FunctionTool] | None = None
    """Functions that the model may call."""
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    """auto, as if not given: the model decides. none: tools are not shown to it. required: it calls at least one. A
    named one: it calls that one."""
    parallel_tool_calls: bool | None = None
    """false: the output ends after its first call."""
    text: TextConfig | None = None
    """Options of the answer's text."""
    reasoning: ReasoningConfig | None = None
    """Options of reasoning."""
    max_output_tokens: int | None = Field(None, ge=1, le=2**63 - 1)
    """Most output tokens, reasoning included."""
    temperature: float | None = Field(None, ge=0, le=100)
    """0 is greedy. If not given, what the model's authors recommend, else 1."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Keep the smallest set of tokens whose probabilities sum to at least this."""
    top_logprobs: int | None = Field(None, ge=0)
    """Needs `include` to have `message.output_text.logprobs`."""
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    """Encrypted reasoning is accepted without effect: items have it in plain text, which can be sent back."""
    stream: bool | None = None
    """Whether to send the answer as events, as it is generated."""
    stream_options: ResponseStreamOptions | None = None
    """Goes with `stream`."""
    truncation: Literal["disabled"] | None = None
    """A conversation that does not fit the context is an error."""
    store: NeedsStore = None
    """Only false: nothing is stored."""
    previous_response_id: NeedsStore = None
    """Not supported: nothing is stored."""
    conversation: NeedsStore = None
    """Not supported: nothing is stored."""
    background: NeedsStore = None
    """Only false: nothing is stored."""
    prompt: NeedsStore = None
    """Prompt templates are stored by the server, which this one does not do."""
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    """Accepted without effect: it counts calls of tools that the server runs, and there are none."""
    metadata: dict[str, str] | None = None
    """Repeated in the answer."""
    user: str | None = None
    """Accepted without effect."""
    safety_identifier: str | None = None
    """Accepted without effect."""
    prompt_cache_key: str | None = None
    """Accepted without effect: prefixes are found by content."""
    service_tier: str | None = None
    """Accepted without effect: there is one tier."""
    context_management: Unsupported = None
    """Not supported."""
    moderation: Unsupported = None
    """Not supported."""
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """Lower runs first; 0 is usual. Not OpenAI's."""
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    """-1 and 0 keep all tokens. Not OpenAI's."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Not OpenAI's."""
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    """Not OpenAI's."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted from the logits of tokens seen in the output. Not OpenAI's."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted, per occurrence in the output, from logits. Not OpenAI's."""
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    """Not OpenAI's."""
    ignore_eos: bool | None = None
    """Not OpenAI's."""
    min_tokens: int | None = Field(None, ge=0, le=2**63 - 1)
    """Not OpenAI's."""
    chat_template_kwargs: dict[str, object] | None = None
    """Variables for the model's chat template. Not OpenAI's."""
