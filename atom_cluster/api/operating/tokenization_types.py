"""Bodies and answers of POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from pydantic import Field

from atom_cluster.api.http.api_model import ApiModel
from atom_cluster.api.openai.chat_messages import ChatMessage, Tool


class TokenizeRequest(ApiModel):
    """Body of POST /tokenize: either `prompt`, or `messages` and what goes with them."""

    model: str | None = None
    """If given, the model that is served."""
    prompt: str | None = None
    """A text."""
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    """Rendered by the model's chat template, as for /v1/chat/completions."""
    tools: list[Tool] | None = None
    """Goes with `messages`."""
    chat_template_kwargs: dict[str, object] | None = None
    """Goes with `messages`."""
    add_generation_prompt: Literal[True] | None = None
    """The prompt ends where the assistant's answer begins; it cannot end elsewhere."""
    continue_final_message: Literal[False] | None = None
    """See `add_generation_prompt`."""
    add_special_tokens: bool | None = None
    """Put those around a text that the tokenizer prescribes: if nothing else is said, around `prompt` and not around
    `messages`, whose template has written them."""
    return_token_strs: bool | None = None
    """Send the tokens' texts too."""


class TokenizeAnswer(Struct, frozen=True, kw_only=True):
    """Answer of /tokenize."""

    count: int
    """How many tokens there are."""
    max_model_len: int
    """Most tokens of prompt plus output."""
    tokens: list[int]
    """Their ids."""
    token_strs: list[str] | None
    """As the vocabulary writes them, if asked for."""


class DetokenizeRequest(ApiModel):
    """Body of POST /detokenize."""

    model: str | None = None
    """If given, the model that is served."""
    tokens: list[int]
    """Token ids."""


class DetokenizeAnswer(Struct, frozen=True, kw_only=True):
    """Answer of /detokenize."""

    prompt: str
    """With the texts of special tokens."""
