"""The base of all request schemas, and kinds of fields that several of them have. Knows no endpoint."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError


def _make_lists_fail_fast(schema: object) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _make_lists_fail_fast(part)
    elif isinstance(schema, (list, tuple)):
        for part in schema:
            _make_lists_fail_fast(part)


class ApiModel(BaseModel):
    """Base of all request models. A list is wrong at its first wrong element: the others are not looked at.

    Else a body of 8 MB would have millions of errors, which take gigabytes and stop the event loop for a minute.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler, /) -> CoreSchema:
        """See the class."""
        schema = handler(source)
        _make_lists_fail_fast(schema)
        return schema


def _refuse(value: object) -> object:
    if value is None or value is False or value in ("", [], {}):
        return value
    raise PydanticCustomError("unsupported", "this server does not support it")


Unsupported = Annotated[object, AfterValidator(_refuse), WithJsonSchema({"enum": [None, False, "", [], {}]})]
"""A field whose meaning the server cannot honour: anything but an empty value is an error that names it."""


def joined_parts(value: object) -> object:
    """Message content as text: a string, or text parts joined by line ends."""
    if not isinstance(value, list):
        return value
    return "\n".join(_part_text(part, index) for index, part in enumerate(value))


def _part_text(part: object, index: int) -> str:
    if not isinstance(part, dict):
        raise PydanticCustomError("content_part", "part {index} is not an object", {"index": index})
    kind = part.get("type")
    if kind != "text":
        raise PydanticCustomError(
            "content_part",
            'part {index} has type {kind}; this server supports only "text"',
            {"index": index, "kind": repr(kind)[:40]},
        )
    text = part.get("text")
    if not isinstance(text, str) or part.keys() - {"type", "text"}:
        raise PydanticCustomError("content_part", 'part {index} must have exactly "type" and "text"', {"index": index})
    return text
