"""Operation: what a route says of itself, beside its handler. `api/openapi/document.py` puts all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Tag = Literal["Generation", "Tokenization", "Models", "Operation"]
JsonSchema = Mapping[str, Any]

_KEY = "operation"

SERVED_MODEL = "<the model>"
"""Stands for the served model's name in examples."""
READ_ERRORS = (401, 403, 429, 431)
"""What any route but the open ones may answer, whatever is asked of it."""
BODY_ERRORS = (400, 404, 408, 413, *READ_ERRORS, 500, 503)
"""What routes with a body may answer besides."""
GENERATION_ERRORS = (*BODY_ERRORS, 504)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A request that is answered with 200, and an answer like the one it gets."""

    summary: str
    request: Mapping[str, Any]
    answer: Any
    """Of a streamed answer: its text."""

    @property
    def is_streamed(self) -> bool:
        """Whether the request asks for events."""
        return bool(self.request.get("stream"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path. Types are pydantic models (what clients send) and msgspec structs (what they get)."""

    tag: Tag
    summary: str
    description: str = ""
    request: type | None = None
    """Schema of the body."""
    is_body_optional: bool = False
    answer: type | JsonSchema | None = None
    """Schema of the body of a 200."""
    media_type: str = "application/json"
    """Of that body. Anything else than JSON is text."""
    events: tuple[type, ...] = ()
    """What the `data:` of events may be, of a route whose body may ask for a stream."""
    errors: tuple[int, ...] = READ_ERRORS
    takes_terms: bool = False
    """Whether headers may give a deadline and a priority."""
    path_params: Mapping[str, str] = field(default_factory=dict)
    """What each name in the path stands for."""
    examples: tuple[Example, ...] = ()
    is_open: bool = False
    """Whether it needs no API key."""


def described(operation: Operation) -> dict[str, Any]:
    """Arguments for `app.get` and its kin: `app.get(path, **described(Operation(...)))(handler)`."""
    return {"openapi_extra": {_KEY: operation}}


def operation_of(route: object) -> Operation | None:
    """What a route says of itself; None if it says nothing."""
    found = (getattr(route, "openapi_extra", None) or {}).get(_KEY)
    return found if isinstance(found, Operation) else None
