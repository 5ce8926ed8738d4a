"""A parameter's text becomes JSON, by what the tool's schema says of it: XML-like formats do not say what is a string.

Schemas are a client's: reading one takes time proportional to its size, and what cannot be read means any type.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

_MAX_REFERENCES = 8
_ANY: frozenset[str] = frozenset()
_LITERALS = {"true": "true", "false": "false", "none": "null", "null": "null"}


class ToolSchemas:
    """Types of the parameters of a request's tools."""

    def __init__(self, parameters_by_name: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Each tool's name with the JSON schema of its arguments."""
        self._schemas = parameters_by_name
        self._types: dict[tuple[str, str], frozenset[str]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tools."""
        return tuple(self._schemas)

    def schema(self, tool: str, parameter: str) -> Mapping[str, Any] | None:
        """The parameter's own schema, which a reference may have named; None when there is none."""
        root = self._schemas.get(tool)
        if not isinstance(root, Mapping):
            return None
        properties = _resolve(root, root).get("properties")
        found = properties.get(parameter) if isinstance(properties, Mapping) else None
        return _resolve(found, root) if isinstance(found, Mapping) else None

    def types(self, tool: str, parameter: str) -> frozenset[str]:
        """JSON schema types that the parameter may have; empty when nothing is known of it."""
        schema = self.schema(tool, parameter)
        if schema is None:
            return _ANY
        if (tool, parameter) not in self._types:
            self._types[tool, parameter] = _types(schema, self._schemas[tool] or {})
        return self._types[tool, parameter]

    def is_string(self, tool: str, parameter: str) -> bool:
        """Whether the parameter's text is the string itself, whatever it looks like."""
        return self.types(tool, parameter) == {"string"}

    def value(self, tool: str, parameter: str, text: str) -> str:
        """JSON for the parameter's text: of a type that the schema allows if it reads as one, else a string."""
        return json_value(text, self.types(tool, parameter))


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


def _types(schema: Mapping[str, Any], root: Mapping[str, Any]) -> frozenset[str]:
    """Types of all alternatives; each schema is looked at once, so that references in circles end."""
    found: set[str] = set()
    seen: set[int] = set()
    pending: list[tuple[object, bool]] = [(schema, True)]
    while pending:
        entry, allows_any = pending.pop()
        schema = _resolve(entry, root) if isinstance(entry, Mapping) else {}
        if id(schema) in seen:
            continue
        seen.add(id(schema))
        own = _own_types(schema)
        alternatives = [*_listed(schema, "anyOf"), *_listed(schema, "oneOf")]
        found |= own
        if not own:
            pending += [(other, allows_any) for other in alternatives]
            pending += [(other, False) for other in _listed(schema, "allOf")]
            if allows_any and not alternatives and not _listed(schema, "allOf"):
                return _ANY
    return frozenset(found)


def _own_types(schema: Mapping[str, Any]) -> set[str]:
    given = schema.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {entry for entry in given if isinstance(entry, str)}
    values = _listed(schema, "enum") or ([schema["const"]] if "const" in schema else [])
    return {_types_of(value)[-1] for value in values}


def _listed(schema: Mapping[str, Any], word: str) -> list[Any]:
    value = schema.get(word)
    return value if isinstance(value, list) else []


def _resolve(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a `$ref` within the same schema names, through a chain of them; the schema itself if it names nothing."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        target: Any = root
        for step in reference[2:].split("/"):
            target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            break
        schema = target
    return schema
