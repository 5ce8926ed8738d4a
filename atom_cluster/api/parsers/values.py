"""A parameter's text becomes JSON, by what the tool's schema says of it: XML-like formats do not say what is a string.

Schemas are a client's: looking a parameter up takes bounded time, however long its references and lists of alternatives
are. What cannot be read, or not in that time, means any type.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

_MAX_REFERENCES = 8
_MAX_REFERENCE_CHARS = 1024
_MAX_ALTERNATIVES = 32
"""Schemas that are looked at to find a parameter's types."""
_ANY: frozenset[str] = frozenset()
_NO_SCHEMA: Mapping[str, Any] = {}
_LITERALS = {"true": "true", "false": "false", "none": "null", "null": "null"}


class ToolSchemas:
    """Types of the parameters of a request's tools."""

    def __init__(self, parameters_by_name: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Each tool's name with the JSON schema of its arguments."""
        self._schemas = parameters_by_name
        self._arguments: dict[str, Mapping[str, Any]] = {}
        self._types: dict[tuple[str, str], frozenset[str]] = {}
        self._own_types: dict[int, frozenset[str]] = {}
        """By the schema's identity: many parameters may name one with a long list of values."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tools."""
        return tuple(self._schemas)

    def arguments(self, tool: str) -> Mapping[str, Any]:
        """The schema of a tool's arguments, which a reference may have named; empty when there is none."""
        if tool not in self._arguments:
            root = self._schemas.get(tool)
            self._arguments[tool] = _resolve(root, root) if isinstance(root, Mapping) else _NO_SCHEMA
        return self._arguments[tool]

    def schema(self, tool: str, parameter: str) -> Mapping[str, Any] | None:
        """The parameter's own schema, which a reference may have named; None when there is none."""
        properties = self.arguments(tool).get("properties")
        found = properties.get(parameter) if isinstance(properties, Mapping) else None
        return _resolve(found, self._schemas[tool] or _NO_SCHEMA) if isinstance(found, Mapping) else None

    def types(self, tool: str, parameter: str) -> frozenset[str]:
        """JSON schema types that the parameter may have; empty when nothing is known of it."""
        schema = self.schema(tool, parameter)
        if schema is None:
            return _ANY
        if (tool, parameter) not in self._types:
            self._types[tool, parameter] = self._find_types(schema, self._schemas[tool] or _NO_SCHEMA)
        return self._types[tool, parameter]

    def is_string(self, tool: str, parameter: str) -> bool:
        """Whether the parameter's text is the string itself, whatever it looks like."""
        return self.types(tool, parameter) == {"string"}

    def value(self, tool: str, parameter: str, text: str) -> str:
        """JSON for the parameter's text: of a type that the schema allows if it reads as one, else a string."""
        return json_value(text, self.types(tool, parameter))

    def _find_types(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> frozenset[str]:
        """Types of all alternatives; each is looked at once, so that references in circles end. Any type where there
        are too many."""
        found: set[str] = set()
        seen: set[int] = set()
        pending: list[tuple[object, bool]] = [(schema, True)]
        while pending:
            entry, allows_any = pending.pop()
            schema = _resolve(entry, root) if isinstance(entry, Mapping) else _NO_SCHEMA
            if id(schema) in seen:
                continue
            seen.add(id(schema))
            own = self._own_types_of(schema)
            found |= own
            if own:
                continue
            alternatives, parts = [*_listed(schema, "anyOf"), *_listed(schema, "oneOf")], _listed(schema, "allOf")
            if len(seen) + len(pending) + len(alternatives) + len(parts) > _MAX_ALTERNATIVES:
                return _ANY
            if allows_any and not alternatives and not parts:
                return _ANY
            pending += [*((other, allows_any) for other in alternatives), *((other, False) for other in parts)]
        return frozenset(found)

    def _own_types_of(self, schema: Mapping[str, Any]) -> frozenset[str]:
        if id(schema) not in self._own_types:
            self._own_types[id(schema)] = _own_types(schema)
        return self._own_types[id(schema)]


def json_value(text: str, types: frozenset[str] = _ANY) -> str:
    """JSON for a text: of one of these JSON schema types (any, if none) if it reads as one, else a string.

    Python's spelling (`True`, `{'a': 1}`) is understood, as models write it now and then.
    """
    stripped = text.strip()
    for candidate in (stripped, _LITERALS.get(stripped.lower()), _from_python(stripped, types)):
        if candidate is not None and _has_type(candidate, types):
            return candidate
    return json.dumps(text, ensure_ascii=False)


def json_text_of(value: object) -> str:
    """JSON of a value that a model wrote. Raises as `json.dumps`; half of a surrogate pair stays escaped, as nothing
    else can be written."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def _has_type(text: str, types: frozenset[str]) -> bool:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return not types or not types.isdisjoint(_types_of(value))


def _types_of(value: object) -> tuple[str, ...]:
    if value is None:
        return ("null",)
    if isinstance(value, bool):
        return ("boolean",)
    if isinstance(value, int):
        return ("integer", "number")
    if isinstance(value, float):
        return ("integer", "number") if value.is_integer() else ("number",)
    if isinstance(value, str):
        return ("string",)
    return ("array",) if isinstance(value, list) else ("object",)


def _from_python(text: str, types: frozenset[str]) -> str | None:
    """JSON of a Python literal; only where a list or an object is expected, so that text is not taken for one."""
    if types and types.isdisjoint({"array", "object"}):
        return None
    try:
        return json_text_of(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _refuse(name: str) -> None:
    raise ValueError(name)


def _own_types(schema: Mapping[str, Any]) -> frozenset[str]:
    given = schema.get("type")
    if isinstance(given, str):
        return frozenset({given})
    if isinstance(given, list):
        return frozenset(entry for entry in given if isinstance(entry, str))
    values = _listed(schema, "enum") or ([schema["const"]] if "const" in schema else [])
    return frozenset(_types_of(value)[-1] for value in values)


def _listed(schema: Mapping[str, Any], word: str) -> list[Any]:
    value = schema.get(word)
    return value if isinstance(value, list) else []


def _resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a `$ref` within the same schema names, through a chain of them; the schema itself if it names nothing."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/") or len(reference) > _MAX_REFERENCE_CHARS:
            break
        target: Any = root
        for step in reference[2:].split("/"):
            if not isinstance(target, Mapping):
                break
            target = target.get(step.replace("~1", "/").replace("~0", "~"))
        if not isinstance(target, Mapping):
            break
        schema = target
    return schema
