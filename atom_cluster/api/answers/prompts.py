"""A request's messages or prompts become token ids; run in the tokenizer's threads.

Text that certainly exceeds the context is refused before all of it is tokenized. Control characters, NUL included, are
text like any other. Knows nothing of sampling or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

from atom_cluster.api.openai.requests import ChatCompletionRequest, CompletionRequest
from atom_cluster.api.openai.tools import template_message, template_tools, unreadable_arguments
from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import ContextLengthExceeded, InvalidRequest

_NUM_END_CHARS = 64


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the model reads it."""

    token_ids: tuple[int, ...]
    end: str
    """The last characters of its text: templates may open or close reasoning there."""


def chat_prompt(
    request: ChatCompletionRequest, *, tokenizer: Tokenizer, template: ChatTemplate | None, max_tokens: int
) -> ChatPrompt:
    """The prompt of a conversation. Raises `InvalidRequest`, or `ContextLengthExceeded` above `max_tokens`."""
    if template is None:
        raise InvalidRequest("the model has no chat template; use /v1/completions", param="messages")
    text = _render(request, template)
    # The template has written the special tokens already.
    token_ids = _encode(text, tokenizer, max_tokens=max_tokens, param="messages", add_special_tokens=False)
    return ChatPrompt(token_ids, text[-_NUM_END_CHARS:])


def _render(request: ChatCompletionRequest, template: ChatTemplate) -> str:
    tools = template_tools(request)
    if tools and not template.knows_tools:
        raise InvalidRequest("the model's chat template knows no tools", param="tools")
    messages = [
        template_message(message, distinguishes_none=template.distinguishes_none) for message in request.messages
    ]
    try:
        return template.render(messages, tools=tools, variables=_variables(request))
    except InvalidRequest as exc:
        field = unreadable_arguments(request.messages) if exc.param == "messages" else None
        if field is None:
            raise
        raise InvalidRequest("the model's chat template needs a JSON object here", param=field) from exc


def _variables(request: ChatCompletionRequest) -> dict[str, object]:
    """Variables for the template. Families call the switch for reasoning by either name, or have none."""
    variables = dict(request.chat_template_kwargs or {})
    effort = request.reasoning_effort
    if request.thinking is not None:
        for name in ("enable_thinking", "thinking"):
            variables.setdefault(name, request.thinking.type == "enabled")
        effort = effort or request.thinking.effort
    if effort is not None:
        for name, value in (("reasoning_effort", effort), ("enable_thinking", effort != "none")):
            variables.setdefault(name, value)
        variables.setdefault("thinking", variables["enable_thinking"])
    return variables


def completion_prompts(request: CompletionRequest, *, tokenizer: Tokenizer, max_tokens: int) -> list[tuple[int, ...]]:
    """Token ids of each prompt. Raises `ContextLengthExceeded` above `max_tokens`."""
    return [
        _encode(prompt, tokenizer, max_tokens=max_tokens, param="prompt", add_special_tokens=True)
        if isinstance(prompt, str)
        else prompt
        for prompt in request.prompt
    ]


def _encode(
    text: str, tokenizer: Tokenizer, *, max_tokens: int, param: str, add_special_tokens: bool
) -> tuple[int, ...]:
    if tokenizer.surely_exceeds(text, max_tokens):
        raise ContextLengthExceeded(
            f"the model's context holds {max_tokens} tokens; the prompt has many more", param=param
        )
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
