"""Which formats a model has is seen from its chat template; what it wrote is read as what the template writes."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from atom_cluster.api.answers.pieces import calls_of, reasoning_of, text_of
from atom_cluster.api.answers.prompts import chat_prompt
from atom_cluster.api.http.request_body import validate
from atom_cluster.api.openai.requests import ChatCompletionRequest
from atom_cluster.api.parsers.call_grammars import CALL_WRITERS
from atom_cluster.api.parsers.dialect import (
    PLAIN_READING,
    REASONING_FORMATS,
    TOOL_FORMATS,
    Dialect,
    ToolUse,
    choose_dialect,
)
from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.config.serving import ReasoningParserName, ToolParserName
from atom_cluster.errors import ConfigError, InvalidRequest
from tests.api.parsers.reading import TOOLS
from tests.api.tiny_tokenizers import byte_level
from tests.api.tool_templates import ANSWER_BEGINS, REASONING, TEMPLATES

WANTED = ToolUse(parameters_by_name=TOOLS, one_call=False)
ARGUMENTS = {"city": 'Paris "\n', "days": 3, "exact": True}


def dialect_of(
    source: str | None, *, tools: str = "auto", reasoning: str = "auto", marks: tuple[str, ...] = ()
) -> Dialect:
    backend = byte_level()
    backend.add_special_tokens(list(marks))
    template = None if source is None else ChatTemplate(source, special_tokens={})
    return choose_dialect(
        tool_parser=tools, reasoning_parser=reasoning, template=template, tokenizer=Tokenizer(backend)
    )


def request(messages: list[dict], **fields: object) -> ChatCompletionRequest:
    tools = [{"type": "function", "function": {"name": name, "parameters": TOOLS[name]}} for name in TOOLS]
    return validate(ChatCompletionRequest, {"model": "m", "messages": messages, "tools": tools, **fields})


def prompt_of(name: str, messages: list[dict], tokenizer: Tokenizer, **fields: object) -> str:
    template = ChatTemplate(TEMPLATES[name], special_tokens={})
    made = chat_prompt(request(messages, **fields), tokenizer=tokenizer, template=template, max_tokens=10**6)
    return tokenizer.decode(made.token_ids, skip_special_tokens=False)


def past_call(index: int = 0) -> dict:
    function = {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}
    return {"id": f"call_{index:04}", "type": "function", "function": function}


@pytest.mark.parametrize("name", TEMPLATES)
def test_formats_are_those_that_the_chat_template_shows(name: str) -> None:
    dialect = dialect_of(TEMPLATES[name])
    assert dialect.tools is TOOL_FORMATS[name]
    reasoning = REASONING.get(name)
    assert dialect.reasoning is (REASONING_FORMATS[reasoning] if reasoning else None)
    assert dialect.choices["tool_parser"].startswith(f"{name}: the chat template has ")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("deepseek_v32", '<｜DSML｜function_calls>\n<｜DSML｜invoke name="$TOOL_NAME">'),
        ("deepseek_v4", '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="$TOOL_NAME">'),
        ("pythonic", "[func_name1(params_name1=params_value1), func_name2(params)]"),
    ],
)
def test_formats_are_those_that_a_system_message_tells(name: str, hint: str) -> None:
    """As configured templates may have it: these families have none of their own, or several."""
    assert dialect_of("{{ tools }}" + hint).tools is TOOL_FORMATS[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_is_read_as_the_template_writes_it(name: str, tokenizer: Tokenizer) -> None:
    call_id = "functions.get_weather:0" if name == "kimi_k2" else past_call()["id"]
    turn = {"role": "assistant", "content": None, "tool_calls": [{**past_call(), "id": call_id}]}
    prompt = prompt_of(name, [{"role": "user", "content": "hi"}, turn], tokenizer)
    written = prompt.partition("hi")[2].partition(ANSWER_BEGINS[name])[2]
    assert "None" not in written
    parser = dialect_of(TEMPLATES[name]).reading(prompt_end="", tools=WANTED).parser()
    (call,) = calls_of([*parser.feed(written), *parser.finish()])
    assert (call.name, json.loads(call.arguments)) == ("get_weather", ARGUMENTS)
    assert call.call_id == call_id or name != "kimi_k2"


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_shown_tools_and_results(name: str, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [past_call()]},
        {"role": "tool", "tool_call_id": "call_0000", "content": "it rains"},
    ]
    prompt = prompt_of(name, messages, tokenizer)
    assert '"exact"' in prompt
    assert "it rains" in prompt or name == "deepseek_v31"
    assert '"boolean"' not in prompt_of(name, messages, tokenizer, tool_choice="none")


def test_reasoning_that_the_prompt_opens_is_known_from_its_end() -> None:
    dialect = dialect_of(TEMPLATES["glm"])
    for prompt_end, expected in (("<|assistant|><think>", "hm"), ("<think>\n", "hm"), ("<|assistant|></think>", "")):
        parser = dialect.reading(prompt_end=prompt_end, tools=None).parser()
        pieces = [*parser.feed("hm"), *parser.finish()]
        assert reasoning_of(pieces) == expected and text_of(pieces) == ("" if expected else "hm")


def test_effort_switches_reasoning_on_and_off(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert prompt_of("glm", messages, tokenizer).endswith("<think>")
    assert prompt_of("glm", messages, tokenizer, reasoning_effort="none").endswith("</think>")
    assert prompt_of("deepseek_v31", messages, tokenizer).endswith("</think>")
    assert prompt_of("deepseek_v31", messages, tokenizer, reasoning_effort="high").endswith("<think>")
    switched = {"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "high"}
    assert prompt_of("deepseek_v31", messages, tokenizer, **switched).endswith("</think>")


def test_marks_that_are_special_tokens_become_visible_when_they_are_read() -> None:
    marks = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "</think>", "<think>")
    dialect = dialect_of(TEMPLATES["kimi_k2"] + "</think>", marks=marks)
    assert len(dialect.reading(prompt_end="", tools=WANTED).shown_ids) == 4
    assert len(dialect.reading(prompt_end="", tools=None).shown_ids) == 2


def test_a_vocabulary_with_marks_of_reasoning_is_enough() -> None:
    dialect = dialect_of("{{ messages }}", marks=("<think>", "</think>"))
    assert dialect.reasoning is REASONING_FORMATS["think"] and dialect.tools is None


def test_a_model_that_has_neither_is_read_as_it_is() -> None:
    for source in (None, "{{ messages }}"):
        assert dialect_of(source).reading(prompt_end="", tools=WANTED) is PLAIN_READING
    assert dialect_of("{{ tools }}").tools is TOOL_FORMATS["json"]


def test_configuration_wins_and_what_does_not_fit_is_refused() -> None:
    dialect = dialect_of(TEMPLATES["glm"], tools="hermes", reasoning="none")
    assert (dialect.tools, dialect.reasoning) == (TOOL_FORMATS["hermes"], None)
    assert dialect.choices == {"tool_parser": "hermes: configured", "reasoning_parser": "none: configured"}
    with pytest.raises(ConfigError, match="do not go together"):
        dialect_of(TEMPLATES["glm"], tools="harmony")


def test_every_format_can_be_configured_and_enforced() -> None:
    assert {*get_args(ToolParserName)} == {"auto", "none", *TOOL_FORMATS}
    assert {*get_args(ReasoningParserName)} == {"auto", "none", *REASONING_FORMATS}
    assert CALL_WRITERS.keys() == TOOL_FORMATS.keys()


def test_arguments_that_a_template_cannot_use_are_told_by_their_field(tokenizer: Tokenizer) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": '}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert '{"city": }\n</tool_call>' in prompt_of("hermes", [turn], tokenizer)
    with pytest.raises(InvalidRequest) as caught:
        prompt_of("glm", [{"role": "user", "content": "hi"}, turn], tokenizer)
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"


def test_a_second_template_is_used_for_tools() -> None:
    template = ChatTemplate("plain", special_tokens={}, tool_source="{{ tools | length }} <tool_call>")
    assert template.render([]) == "plain"
    assert template.render([], tools=[{}, {}]) == "2 <tool_call>"
