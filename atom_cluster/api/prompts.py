"""A request's messages or prompts become token ids; run in the tokenizer's threads.

Text that certainly exceeds the context is refused before all of it is tokenized. Control characters, NUL included, are
text like any other. Knows nothing of sampling or HTTP.
"""

from __future__ import annotations

from atom_cluster.api.chat_template import ChatTemplate
from atom_cluster.api.openai_types import ChatCompletionRequest, ChatMessage, CompletionRequest
from atom_cluster.api.tokenizer import Tokenizer
from atom_cluster.errors import ContextLengthExceeded, InvalidRequest


def chat_prompt(
    request: ChatCompletionRequest, *, tokenizer: Tokenizer, template: ChatTemplate | None, max_tokens: int
) -> tuple[int, ...]:
    """Token ids of a conversation. Raises `InvalidRequest`, or `ContextLengthExceeded` above `max_tokens`."""
    if template is None:
        raise InvalidRequest("the model has no chat template; use /v1/completions", param="messages")
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    text = template.render([_template_message(message) for message in request.messages], variables=variables)
    # The template has written the special tokens already.
    return _encode(text, tokenizer, max_tokens=max_tokens, param="messages", add_special_tokens=False)


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


def _template_message(message: ChatMessage) -> dict[str, object]:
    """Keys that templates know, and only those given: some templates test for their presence."""
    result: dict[str, object] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.content,
    }
    if message.name is not None:
        result["name"] = message.name
    if message.reasoning_content is not None:
        result["reasoning_content"] = message.reasoning_content
    return result
