"""An HTTP body becomes a checked request model, or an error in the client's own words.

Everything here assumes a hostile sender: size and time are bounded while reading, JSON is taken strictly (UTF-8, no
NaN, no duplicate keys, no lone surrogates, bounded depth). Knows nothing of what the fields mean.
"""

from __future__ import annotations

import asyncio
import difflib
import json
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from atom_cluster.errors import BodyTimeout, InvalidRequest, RequestTooLarge

ModelT = TypeVar("ModelT", bound=BaseModel)

MAX_DEPTH = 64
"""Deepest nesting of a body that is passed on."""
MAX_KEYS = 4096
"""Most keys of one object: each may be an error of its own, and all of them are looked at."""
MAX_OBJECTS = 32768
"""Most objects of a body. Checking one against its schema takes microseconds, while nobody else is served."""
_MAX_NAME_CHARS = 100


async def read_json_body(request: Request, *, max_bytes: int, timeout_s: float) -> dict[str, object]:
    """The JSON object a client sent.

    Raises `RequestTooLarge` before reading a body that says it is too large and while reading one that does not say,
    `BodyTimeout` after `timeout_s` seconds, `InvalidRequest` for anything that is not a JSON object.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise InvalidRequest("the header `Content-Type` must be `application/json`", code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > len(str(max_bytes)) or int(declared) > max_bytes):
        raise _too_large(max_bytes)
    try:
        body = await asyncio.wait_for(_read(request, max_bytes), timeout_s)
    except asyncio.TimeoutError as exc:
        raise BodyTimeout(f"the body did not arrive within {timeout_s:g} s") from exc
    return parse_json_object(body)


def parse_json_object(body: bytes) -> dict[str, object]:
    """Strict JSON. Raises `InvalidRequest`."""
    if not body:
        raise _malformed("it is empty")
    try:
        text = body.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_ObjectMaker(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as exc:
        raise _malformed(f"byte {exc.start} is not UTF-8") from exc
    except RecursionError as exc:
        raise _malformed("it is nested too deeply") from exc
    except ValueError as exc:
        raise _malformed(str(exc)) from exc
    if not isinstance(value, dict):
        raise _malformed("it is not an object")
    if _is_deeper_than(value, MAX_DEPTH):
        raise _malformed("it is nested too deeply")
    if "\\u" in text and has_lone_surrogate(value):
        raise _malformed("a string has half of a surrogate pair, which is no character")
    return value


def has_lone_surrogate(value: object) -> bool:
    """Whether JSON has a string with half of a surrogate pair, which is not text: nothing takes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def validate(model: type[ModelT], body: dict[str, object]) -> ModelT:
    """The request a body describes. Raises `InvalidRequest` that names the first wrong field and lists some others."""
    try:
        return model.model_validate(body)
    except ValidationError as exc:
        errors = exc.errors(include_url=False, include_context=False, include_input=False)
        shown = "; ".join(_describe(error, model) for error in errors[:3])
        raise InvalidRequest(shown, param=_field_path(errors[0])) from exc


async def _read(request: Request, max_bytes: int) -> bytes:
    chunks = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is larger than {max_bytes} bytes")


def _malformed(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the body is not valid JSON for this API: {reason}", code="invalid_json")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class _ObjectMaker:
    """Makes the objects of one body."""

    def __init__(self) -> None:
        self._num_objects = 0

    def __call__(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        """One object from its keys and values. Raises `ValueError`."""
        self._num_objects += 1
        if self._num_objects > MAX_OBJECTS:
            raise ValueError(f"it has more than {MAX_OBJECTS} objects")
        if len(pairs) > MAX_KEYS:
            raise ValueError(f"an object has more than {MAX_KEYS} keys")
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise ValueError(f"the key {json.dumps(key[:_MAX_NAME_CHARS])} appears twice in one object")
                seen.add(key)
        return result


def _is_deeper_than(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return False
    return True


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        items: list[object] = list(value.values())
    elif isinstance(value, list):
        items = value
    else:
        items = []
    # The prompt may be a million token ids: look at their types without a Python step for each.
    if not {dict, list} & set(map(type, items)):
        return []
    return [item for item in items if isinstance(item, (dict, list))]


def _field_path(error: ErrorDetails) -> str:
    """`("messages", 0, "role")` as a client writes it: `messages[0].role`.

    Steps in angle brackets are which case of a union applies, which clients do not write.
    """
    path = ""
    for step in error["loc"]:
        if isinstance(step, str) and step.startswith("<"):
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step[:_MAX_NAME_CHARS]}"
    return path.lstrip(".")


def _describe(error: ErrorDetails, model: type[BaseModel]) -> str:
    path = _field_path(error)
    if error["type"] != "extra_forbidden":
        return f"`{path}`: {error['msg']}"
    close = difflib.get_close_matches(path, model.model_fields, n=1)
    return f"`{path}`: unknown field" + (f"; did you mean `{close[0]}`?" if close else "")
