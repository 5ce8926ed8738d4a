"""JSON schemas of what clients send and get, as the components of one OpenAPI document."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_PREFIX = "#/components/schemas/"


def components(types: Iterable[type]) -> dict[str, Any]:
    """Schemas by name of these types and all they consist of. Raises `ValueError` when two types have one name."""
    all_types = set(types)
    models = sorted((it for it in all_types if issubclass(it, BaseModel)), key=lambda it: it.__name__)
    structs = sorted((it for it in all_types if not issubclass(it, BaseModel)), key=lambda it: it.__name__)
    _, of_models = models_json_schema([(it, "validation") for it in models], ref_template=_PREFIX + "{model}")
    _, of_structs = msgspec.json.schema_components(structs, ref_template=_PREFIX + "{name}")
    found: dict[str, Any] = of_models.get("$defs", {})
    if clashes := sorted(found.keys() & of_structs.keys() | {name for name in found if "__" in name}):
        raise ValueError(f"these names stand for several types: {', '.join(clashes)}")
    _describe_fields(of_structs, structs)
    found |= of_structs
    return _without_titles(found)


def reference(kind: type) -> dict[str, str]:
    """A type's schema, by name."""
    return {"$ref": _PREFIX + kind.__name__}


def reference_name(ref: str) -> str:
    """Name of the component that a reference is to."""
    return ref.removeprefix(_PREFIX)


def _describe_fields(schemas: dict[str, Any], structs: Iterable[type]) -> None:
    """Put the docstrings under the fields of structs into their schemas, where msgspec does not look for them."""
    seen: set[type] = set()
    waiting = list(structs)
    while waiting:
        kind = waiting.pop()
        if kind in seen or not issubclass(kind, msgspec.Struct):
            continue
        seen.add(kind)
        waiting += _structs_within(kind)
        properties = schemas.get(kind.__name__, {}).get("properties", {})
        for name, text in _field_docs(kind).items():
            if name in properties:
                properties[name]["description"] = text


def _structs_within(kind: type[msgspec.Struct]) -> list[type]:
    found: list[type] = []
    waiting: list[Any] = [info.type for info in msgspec.structs.fields(kind)]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, type) and issubclass(entry, msgspec.Struct):
            found.append(entry)
        waiting += getattr(entry, "__args__", ())
    return found


def _field_docs(kind: type) -> dict[str, str]:
    """Docstrings under the annotated names of a class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base in (msgspec.Struct, object) or not issubclass(base, msgspec.Struct):
            continue
        definition = _definitions(base.__module__)[base.__name__]
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = _docstring(following)
                if text:
                    docs[statement.target.id] = inspect.cleandoc(text)
    return docs


@lru_cache(maxsize=64)
def _definitions(module: str) -> dict[str, ast.ClassDef]:
    """The classes that a module defines, as they are written."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {statement.name: statement for statement in tree.body if isinstance(statement, ast.ClassDef)}


def _docstring(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        value = statement.value.value
        return value if isinstance(value, str) else None
    return None


def _without_titles(schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Titles only repeat names. Descriptions lose the line breaks of their source."""
    result: dict[str, Any] = {}
    for name, schema in schemas.items():
        tidied = _tidied(json.loads(json.dumps(schema)))
        assert isinstance(tidied, dict)
        result[name] = tidied
    return result


def _tidied(value: Any, *, is_properties: bool = False) -> Any:
    if isinstance(value, list):
        return [_tidied(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, entry in value.items():
        if key == "title" and not is_properties and isinstance(entry, str):
            continue
        if key == "description" and not is_properties and isinstance(entry, str):
            result[key] = " ".join(entry.split())
        else:
            result[key] = _tidied(entry, is_properties=key in ("properties", "$defs") and not is_properties)
    return result
