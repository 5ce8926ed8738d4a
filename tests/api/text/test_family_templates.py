"""What families' templates do renders as in `transformers`, and their switches arrive from the request."""

from __future__ import annotations

import json

import pytest

from atom_cluster.api.answers.prompts import chat_prompt
from atom_cluster.api.http.request_body import validate
from atom_cluster.api.openai.requests import ChatCompletionRequest
from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import InvalidRequest
from tests.api.family_templates import ANSWER_STARTS, GEMMA, TEMPLATES
from tests.api.tiny_tokenizers import byte_level

SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
ALTERNATING = [
    {"role": "user", "content": " Grüße 😀\n"},
    {"role": "assistant", "content": "hello\n", "reasoning_content": "First, \n"},
    {"role": "user", "content": "<b>&amp;</b>"},
]
CONVERSATIONS = {
    "user first": ALTERNATING,
    "system first": [{"role": "system", "content": "Be 'kind'."}, *ALTERNATING],
    "thoughts in the text": [
        ALTERNATING[0],
        {"role": "assistant", "content": "<think>\nFirst, </think>\n\nhello"},
        ALTERNATING[2],
    ],
    "two rounds": [*ALTERNATING, ALTERNATING[1], ALTERNATING[2]],
}


def by_transformers(template: str, messages: list[dict[str, str]], variables: dict[str, object]) -> str:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **SPECIAL_TOKENS)
    text = reference.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
    )
    assert isinstance(text, str)
    return text


def by_request(template: str, messages: list[dict[str, str]], **fields: object) -> str:
    """The text that a request's prompt stands for."""
    tokenizer = Tokenizer(byte_level(), special_tokens=SPECIAL_TOKENS)
    request = validate(ChatCompletionRequest, {"model": "m", "messages": messages, **fields})
    compiled = ChatTemplate(template, special_tokens=tokenizer.special_tokens)
    ids = chat_prompt(request, tokenizer=tokenizer, template=compiled, max_tokens=100_000).token_ids
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(("family", "switch"), ANSWER_STARTS)
def test_families_prompts_are_those_of_transformers(family: str, switch: str | None, conversation: str) -> None:
    name, _, value = (switch or "").partition("=")
    variables = {name: json.loads(value)} if switch else {}
    template, messages = TEMPLATES[family], CONVERSATIONS[conversation]
    text = by_request(template, messages, chat_template_kwargs=variables)
    assert text == by_transformers(template, messages, variables)
    assert text.endswith(ANSWER_STARTS[family, switch])
    assert all(turn["content"].strip() in text for turn in messages if turn["role"] == "user")


def test_reasoning_effort_of_the_request_is_the_template_s() -> None:
    template = TEMPLATES["gpt-oss"]
    assert "Reasoning: medium\n" in by_request(template, ALTERNATING)
    assert "Reasoning: low\n" in by_request(template, ALTERNATING, reasoning_effort="low")
    both = by_request(template, ALTERNATING, reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"})
    assert "Reasoning: high\n" in both


def test_reasoning_of_the_last_turn_reaches_templates_that_call_it_thinking() -> None:
    text = by_request(TEMPLATES["gpt-oss"], ALTERNATING[:2])
    assert "<|channel|>analysis<|message|>First, \n<|end|>" in text


def test_what_a_family_refuses_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        by_request(GEMMA, ALTERNATING[1:])
