"""What a model may write when calls are enforced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokenizers
from llguidance import LLMatcher

from atom_cluster.api.answers.answer_grammar import chat_grammar
from atom_cluster.api.http.request_body import validate
from atom_cluster.api.openai.requests import ChatCompletionRequest
from atom_cluster.api.parsers.dialect import Dialect, choose_dialect
from atom_cluster.api.parsers.lark_writer import LarkWriter
from atom_cluster.api.text.chat_template import ChatTemplate
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import InvalidRequest
from atom_cluster.messages.requests import GrammarSpec
from atom_cluster.structured.grammar import compile_grammar
from atom_cluster.structured.vocabulary import Vocabulary
from tests.api.tiny_tokenizers import byte_level
from tests.api.tool_templates import TEMPLATES

MARKS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>",
    "<|constrain|>",
)  # fmt: skip
STRICT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": STRICT, "strict": True}},
    {"type": "function", "function": {"name": "g", "parameters": STRICT}},
]
LOOSE = TOOLS[1:]
F = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
G = '<tool_call>\n{"name": "g", "arguments": {"y": []}}\n</tool_call>'
LENIENT = {
    "name": "a",
    "strict": False,
    "schema": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
}
JSON = {"type": "json_schema", "json_schema": {"name": "a", "schema": STRICT}}


class Model:
    """A vocabulary of bytes and marks, and the formats of a family."""

    def __init__(self, family: str) -> None:
        self.backend = byte_level()
        self.backend.add_special_tokens(list(MARKS))
        self.vocabulary = Vocabulary(
            tokenizers.Tokenizer.from_str(self.backend.to_str()), self.backend.get_vocab_size()
        )
        self.tokenizer = Tokenizer(self.backend)
        self.dialect: Dialect = choose_dialect(
            tool_parser="auto",
            reasoning_parser="auto",
            template=ChatTemplate(TEMPLATES[family], special_tokens={}),
            tokenizer=self.tokenizer,
        )

    def grammar(self, *, prompt_end: str = "", **fields: object) -> GrammarSpec | None:
        body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "tools": TOOLS, **fields}
        wanted = chat_grammar(
            validate(ChatCompletionRequest, body),
            dialect=self.dialect,
            prompt_end=prompt_end,
            tokenizer=self.tokenizer,
            max_bytes=10_000,
        )
        return wanted and wanted.spec

    def accepts(self, text: str, **fields: object) -> bool:
        """Whether an output may be this text."""
        spec = self.grammar(**fields)
        assert spec is not None
        matcher: LLMatcher = compile_grammar(spec, self.vocabulary).matcher.deep_copy()
        token_ids = self.backend.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.fixture(scope="module")
def qwen() -> Model:
    return Model("hermes")


NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("fields", "allowed", "refused"),
    [
        (
            {"tool_choice": "required"},
            [F, f"{F}\n{F}", f"<think>\nhm</think>\n\n{F}", f"\n<think></think>{F}"],
            ["hello", G, f"hello {F}", f"{F} hello", "<think>hm</think>", f"<think>hm{F}", ""],
        ),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [F], [f"{F}\n{F}"]),
        ({"tool_choice": NAMED}, [F], [f"{F}\n{F}", F.replace('"f"', '"g"')]),
        (
            {},  # one of the tools is strict
            ["hello", "", F, G, f"hello\n{F}", f"<think>{'a' * 50}</think>hello {G}"],
            [F.replace("1", "true"), f"hello {F} hello"],
        ),
        (
            {"tools": LOOSE, "response_format": JSON},
            ['{"x": 1}', G, '<think>hm</think>\n\n{"x": 1}'],
            ["hello", '{"x": true}', f'{{"x": 1}}{G}'],
        ),
        (
            {"tools": LOOSE, "response_format": {"type": "json_schema", "json_schema": LENIENT}},
            ["[1, 1]", G],
            ["hello", "[true]"],
        ),
        ({"tools": LOOSE, "guided_regex": "a/b|c"}, ["a/b", "c", G], ["a", "hello"]),
        ({"tools": LOOSE, "guided_choice": ["yes", "no"]}, ["yes", G], ["maybe"]),
        ({"tools": LOOSE, "guided_choice": ["\x7f", "\x00", "€"]}, ["\x7f", "\x00", "€"], ["a"]),
    ],
)
def test_outputs_are_those_that_a_request_allows(
    qwen: Model, fields: dict, allowed: list[str], refused: list[str]
) -> None:
    assert [text for text in allowed if not qwen.accepts(text, **fields)] == []
    assert [text for text in refused if qwen.accepts(text, **fields)] == []


def test_reasoning_that_the_prompt_opened_stays_free(qwen: Model) -> None:
    spec = qwen.grammar(tool_choice="required", prompt_end="assistant\n<think>\n")
    assert spec is not None and spec.after == (qwen.tokenizer.token_id("</think>"),)
    assert qwen.accepts(f"\n\n{F}", tool_choice="required", prompt_end="<think>")
    assert not qwen.accepts(f"<think></think>{F}", tool_choice="required", prompt_end="<think>")


def test_structured_answers_may_be_thought_about(qwen: Model) -> None:
    fields = {"tools": None, "response_format": JSON}
    assert qwen.accepts('{"x": 1}', **fields) and qwen.accepts('<think>hm</think>\n\n{"x": 1}', **fields)
    assert not qwen.accepts('<think>hm</think>\n\n{"x": true}', **fields)
    closed = {**fields, "prompt_end": "<think>\n\n</think>\n\n"}
    assert qwen.accepts('{"x": 1}', **closed) and not qwen.accepts('<think>hm</think>{"x": 1}', **closed)
    opened = qwen.grammar(**fields, prompt_end="<think>\n")
    assert opened is not None and opened.after == (qwen.tokenizer.token_id("</think>"),)
    free = qwen.grammar(tools=None, guided_grammar='start: "a"')
    assert free is not None and free.text == 'start: "a"'


def test_gpt_oss_thinks_and_talks_before_it_calls() -> None:
    model = Model("harmony")
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    call = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}'
    final = '<|channel|>final<|message|>{"x": 1}'
    for text in (call, thought + call, thought + thought.replace("analysis", "commentary") + call):
        assert model.accepts(text, tool_choice="required")
    assert not model.accepts(thought + final, tool_choice="required")
    assert model.accepts(thought + final, response_format=JSON) and model.accepts(call, response_format=JSON)
    assert not model.accepts(final.replace("1", "true"), response_format=JSON)


def test_nothing_is_enforced_where_nobody_asked(qwen: Model) -> None:
    assert qwen.grammar(tools=LOOSE) is None
    assert qwen.grammar(tool_choice="none") is None


def test_what_cannot_be_enforced_names_its_field(qwen: Model) -> None:
    enum = {"type": "object", "properties": {"a": {"enum": ["a" * 20_000]}}}
    long = {"type": "function", "function": {"name": "f", "parameters": enum}}
    for fields, param in (
        ({"tools": [long], "tool_choice": "required"}, "tools"),
        ({"guided_grammar": 'start: "a"'}, "guided_grammar"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            qwen.grammar(**fields)
        assert caught.value.param == param


def test_a_grammar_that_is_too_long_is_given_up_while_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many parameters names the same large definitions: a small request, and a grammar of their product."""
    definitions = {f"d{i}": {"type": "integer"} for i in range(200)}
    properties = {f"p{i}": {"$ref": "#/$defs/d0"} for i in range(200)}
    parameters = {"type": "object", "properties": properties, "$defs": definitions}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    num_written = 0

    def count(writer: LarkWriter, body: str, rule: Callable[[LarkWriter, str], str] = LarkWriter.rule) -> str:
        nonlocal num_written
        num_written += len(body)
        return rule(writer, body)

    monkeypatch.setattr(LarkWriter, "rule", count)
    with pytest.raises(InvalidRequest, match="more than 10000 bytes") as caught:
        Model("qwen3_coder").grammar(tools=[tool], tool_choice="required")
    assert caught.value.param == "tools" and num_written < 20_000


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("hermes", '<tool_call>\n{{"name": "f", "arguments": {{{x}}}}}\n</tool_call>'),
        ("qwen3_coder", "<tool_call>\n<function=f>\n{x}</function>\n</tool_call>"),
    ],
)
def test_arguments_that_refer_to_themselves_are_enforced(family: str, call: str) -> None:
    again = {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}
    arguments = {**STRICT, "properties": {**STRICT["properties"], "next": again}}
    tool = {"name": "f", "parameters": {"$ref": "#/$defs/A", "$defs": {"A": arguments}}}
    fields = {"tools": [{"type": "function", "function": tool}], "tool_choice": "required"}
    model, x = Model(family), '"x": 1' if family == "hermes" else "<parameter=x>\n1\n</parameter>\n"
    assert model.accepts(call.format(x=x), **fields) and not model.accepts(call.format(x=""), **fields)


def test_what_a_schema_says_to_people_is_no_part_of_the_grammar(qwen: Model) -> None:
    properties = {"description": {"type": "string", "description": "prose"}, "title": {"enum": [{"title": "kept"}]}}
    parameters = {"type": "object", "properties": properties, "required": ["description"], "title": "prose"}
    tool = {"type": "function", "function": {"name": "f", "description": "prose", "parameters": parameters}}
    spec = qwen.grammar(tools=[tool], tool_choice="required")
    assert spec is not None and "prose" not in spec.text and "kept" in spec.text
    call = '<tool_call>\n{"name": "f", "arguments": {"description": "d"}}\n</tool_call>'
    assert qwen.accepts(call, tools=[tool], tool_choice="required")
    assert not qwen.accepts(call.replace('"description": "d"', ""), tools=[tool], tool_choice="required")
