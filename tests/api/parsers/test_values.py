"""Text of a parameter becomes JSON of the type that the tool's schema has for it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from atom_cluster.api.parsers import values
from atom_cluster.api.parsers.values import ToolSchemas


def value(text: str, schema: dict[str, Any]) -> Any:
    schemas = ToolSchemas({"f": {"type": "object", "properties": {"p": schema}}})
    return json.loads(schemas.value("f", "p", text))


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("5", {"type": "string"}, "5"),
        ("5", {"type": "integer"}, 5),
        ("5.0", {"type": "integer"}, 5.0),
        ("5.5", {"type": "integer"}, "5.5"),
        ("5", {"type": "number"}, 5),
        ("True", {"type": "boolean"}, True),
        ("yes", {"type": "boolean"}, "yes"),
        ("None", {"type": ["integer", "null"]}, None),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("{'a': (1, None)}", {"type": "object"}, {"a": [1, None]}),
        ("{1, 2}", {"type": "object"}, "{1, 2}"),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": ["1", "2"]}, "2"),
        ("2", {"const": 2}, 2),
        ("2", {"allOf": [{"description": "x"}, {"type": "string"}]}, "2"),
        ("2", {"oneOf": [{"type": "string"}, {}]}, 2),
        ("text", {}, "text"),
        ("2", {}, 2),
        ("NaN", {"type": "number"}, "NaN"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
    ],
)
def test_a_value_has_a_type_that_its_schema_allows_or_is_text(text: str, schema: dict[str, Any], expected: Any) -> None:
    found = value(text, schema)
    assert found == expected and type(found) is type(expected)


def test_references_lead_to_what_they_name() -> None:
    root = {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/A"}, "q": {"$ref": "#/$defs/none"}, "r": {"$ref": "http://x"}},
        "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"type": "string"}},
    }
    schemas = ToolSchemas({"f": root})
    assert schemas.types("f", "p") == {"string"}
    assert (
        schemas.types("f", "q")
        == schemas.types("f", "r")
        == schemas.types("f", "s")
        == schemas.types("g", "p")
        == set()
    )


def test_schemas_that_go_in_circles_or_grow_are_read_once() -> None:
    circle = {"$ref": "#/$defs/A"}
    root = {
        "type": "object",
        "properties": {"p": circle},
        "$defs": {"A": {"anyOf": [*[circle] * 20, {"type": "string"}]}},
    }
    assert ToolSchemas({"f": root}).types("f", "p") == {"string"}
    assert ToolSchemas({"f": None}).types("f", "p") == set()


def test_the_arguments_themselves_may_be_a_reference() -> None:
    """As schemas of models that contain themselves are."""
    arguments = {"type": "object", "properties": {"p": {"type": "string"}, "next": {"$ref": "#/$defs/A"}}}
    schemas = ToolSchemas({"f": {"$ref": "#/$defs/A", "$defs": {"A": arguments}}})
    assert schemas.arguments("f") is arguments and schemas.arguments("g") == {}
    assert (schemas.types("f", "p"), schemas.types("f", "next")) == ({"string"}, {"object"})


def test_what_takes_long_to_look_up_means_any_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of parameters may name the same long list: the work must not be the product of both."""
    num_read = 0

    def count(schema: Any, own: Any = values._own_types) -> Any:
        nonlocal num_read
        num_read += 1
        return own(schema)

    monkeypatch.setattr(values, "_own_types", count)
    definitions = {
        "long": {"anyOf": [{"const": i} for i in range(5000)]},
        "values": {"enum": [*range(5000)]},
        "far": {"$ref": "#/" + "$defs/" * 5000 + "values"},
    }
    root = {"properties": {f"{name}-{i}": {"$ref": f"#/$defs/{name}"} for name in definitions for i in range(100)}}
    schemas = ToolSchemas({"f": {**root, "$defs": definitions}})
    assert {schemas.types("f", f"long-{i}") for i in range(100)} == {frozenset()}
    assert {schemas.types("f", f"values-{i}") for i in range(100)} == {frozenset({"number"})}
    assert schemas.types("f", "far-0") == set()
    assert num_read == 3
