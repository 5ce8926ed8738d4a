"""What compiles, what is refused, and that both end."""

from __future__ import annotations

import json

import pytest

from atom_cluster.errors import InvalidRequest
from atom_cluster.messages.requests import GrammarSpec
from atom_cluster.structured.grammar import compile_grammar
from atom_cluster.structured.state import GrammarState
from tests.structured.vocabularies import END, ids_of, word_vocabulary


def accepts(spec: GrammarSpec, text: str) -> bool:
    """Whether the whole text matches."""
    state = GrammarState(compile_grammar(spec, word_vocabulary()), eos_token_ids=[END])
    state.advance(ids_of(text))
    return state.error is None and state.matcher.is_accepting()


def schema(value: object) -> GrammarSpec:
    return GrammarSpec(kind="json_schema", text=json.dumps(value))


PERSON = schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (PERSON, ['{"name":"Ada","age":36}', '{"name": "Ada"}', '{\n  "name": "Ada"\n}'], ["{}", '{"name":"Grace"}']),
        (GrammarSpec(kind="json_object"), ["{}", '{"a": [1, null]}'], ["[1]", "{", '{"a"  : 1}']),
        (GrammarSpec(kind="regex", text="[0-9]{3}-[a-z]+"), ["123-ab"], ["12-ab", "123-", "x123-ab"]),
        (GrammarSpec(kind="choice", text='["yes", "yes please", "\\"no\\"\\n"]'), ["yes", '"no"\n'], ["ye", "yes "]),
        (GrammarSpec(kind="lark", text='start: "a" start? "b"'), ["ab", "aabb"], ["aab", ""]),
        (GrammarSpec(kind="lark", text='root ::= "a" root "b" | "c"'), ["aacbb", "c"], ["ab"]),
        (
            schema({"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}),
            ["[[],[]]"],
            ["["],
        ),
        (schema({"type": "string", "pattern": "^[A-Z]{2}$"}), ['"AB"'], ['"ABC"', '"A"']),
        (schema({"const": {"a": [1, "b"]}}), ['{"a":[1,"b"]}'], ['{"a":[1]}']),
        # Expressions that make backtracking engines stand still, and ones of unusual form.
        (GrammarSpec(kind="regex", text="(a+)+$"), ["a" * 50], ["a" * 50 + "b", ""]),
        (GrammarSpec(kind="regex", text="foo**"), ["fo", "fooo"], ["f"]),
        (GrammarSpec(kind="regex", text="^(|.*)$"), ["", "anything"], ["a\nb"]),
        (GrammarSpec(kind="regex", text=".{1,100000}"), ["a" * 300], [""]),
        (GrammarSpec(kind="regex", text="((a{1,100}){1,100}){1,100}"), ["aaa"], ["b"]),
    ],
)
def test_a_grammar_accepts_what_it_says(spec: GrammarSpec, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not accepts(spec, text)] == []
    assert [text for text in bad if accepts(spec, text)] == []


def test_an_enum_of_ten_thousand_compiles() -> None:
    spec = schema({"enum": [f"value {number}" for number in range(10_000)]})
    assert accepts(spec, '"value 7654"')
    assert not accepts(spec, '"value 10000"')


@pytest.mark.parametrize(
    "spec",
    [
        schema({"type": "strin"}),
        schema({"type": "array", "uniqueItems": True}),
        schema({"$ref": "#"}),
        schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        schema({"$ref": "#/$defs/missing"}),
        schema({"$ref": "http://169.254.169.254/schema"}),
        schema({"$ref": "file:///etc/passwd"}),
        schema({"enum": []}),
        schema({"type": "string", "pattern": "(?=a)b"}),
        schema({"type": "string", "pattern": "("}),
        schema([]),
        GrammarSpec(kind="json_schema", text="{"),
        GrammarSpec(kind="json_schema", text='{"type":"array","items":' * 500 + "{}" + "}" * 500),
        GrammarSpec(kind="regex", text="("),
        GrammarSpec(kind="regex", text=r"(a)\1"),
        GrammarSpec(kind="regex", text="a" * 300_000),
        GrammarSpec(kind="choice", text="[]"),
        GrammarSpec(kind="choice", text='[""]'),
        GrammarSpec(kind="choice", text='"yes"'),
        GrammarSpec(kind="lark", text=""),
        GrammarSpec(kind="lark", text="start: missing"),
        GrammarSpec(kind="lark", text="start: start"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(spec: GrammarSpec) -> None:
    with pytest.raises(InvalidRequest, match="the grammar cannot be used: .{8}") as caught:
        compile_grammar(spec, word_vocabulary())
    assert caught.value.param == "grammar"
    assert len(str(caught.value)) < 400


def test_a_lenient_schema_ignores_what_cannot_be_enforced() -> None:
    values = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "x-guidance": {"lenient": True}}
    assert accepts(schema(values), "[1,1]")
