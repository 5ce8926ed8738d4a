"""Messages and prompts become token ids."""

from __future__ import annotations

import pytest

from atom_cluster.api.answers.prompts import chat_prompt, completion_prompts
from atom_cluster.api.http.request_body import validate
from atom_cluster.api.openai.requests import ChatCompletionRequest, CompletionRequest
from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import ContextLengthExceeded, InvalidRequest

TEMPLATE = ChatTemplate("{{ messages | tojson }}{{ reasoning_effort }}{{ extra }}", special_tokens={})


def chat(**fields: object) -> ChatCompletionRequest:
    return validate(ChatCompletionRequest, {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields})


def test_templates_see_only_given_keys_and_know_the_developer_as_system(tokenizer: Tokenizer) -> None:
    messages = [{"role": "developer", "content": "d"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    request = chat(messages=messages, reasoning_effort="low", chat_template_kwargs={"extra": 1})
    prompt = chat_prompt(request, tokenizer=tokenizer, template=TEMPLATE, max_tokens=1000)
    text = tokenizer.decode(prompt.token_ids)
    assert text == (
        '[{"role": "system", "content": "d"}, '
        '{"thinking": "r", "role": "assistant", "content": "a", "reasoning_content": "r"}]low1'
    )


def test_special_tokens_of_the_template_are_single_tokens(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("<|im_start|>{{ messages[0].content }}", special_tokens={})
    ids = chat_prompt(chat(), tokenizer=tokenizer, template=template, max_tokens=10).token_ids
    assert ids == (tokenizer.token_id("<|im_start|>"), tokenizer.token_id("a"))


def test_a_model_without_template_says_so(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        chat_prompt(chat(), tokenizer=tokenizer, template=None, max_tokens=10)


def test_token_ids_pass_and_text_is_encoded(tokenizer: Tokenizer) -> None:
    def ids(prompt: object) -> list[tuple[int, ...]]:
        request = validate(CompletionRequest, {"model": "m", "prompt": prompt})
        return completion_prompts(request, tokenizer=tokenizer, max_tokens=100)

    assert ids([[5, 6], [7]]) == [(5, 6), (7,)]
    assert ids(["ab", "\x00"]) == [tuple(tokenizer.encode("ab")), tuple(tokenizer.encode("\x00"))]


def test_a_million_tokens_are_refused_before_all_are_encoded(tokenizer: Tokenizer) -> None:
    request = validate(CompletionRequest, {"model": "m", "prompt": "a " * 500_000})
    with pytest.raises(ContextLengthExceeded) as caught:
        completion_prompts(request, tokenizer=tokenizer, max_tokens=100)
    assert caught.value.param == "prompt"
