"""The OpenAPI 3.1 document of an app, made of what its routes say of themselves. Knows no route."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from starlette.routing import BaseRoute

from atom_cluster import __version__
from atom_cluster.api.anthropic.errors import MessagesError, speaks_anthropic
from atom_cluster.api.http.request_id import HEADER
from atom_cluster.api.http.request_terms import MAX_TIMEOUT_MS, PRIORITY_HEADER, TIMEOUT_HEADER
from atom_cluster.api.openai.wire import ErrorBody
from atom_cluster.api.openapi.operation import SERVED_MODEL, Example, Operation, operation_of
from atom_cluster.api.openapi.schemas import components, reference
from atom_cluster.config.protection import MAX_PRIORITY

Json = dict[str, Any]

_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "There is no valid API key. Only if keys are configured.",
    403: "The API key may not do this.",
    404: "There is no such model, path or object.",
    408: "The body did not arrive in time.",
    409: "It cannot be done in the present state.",
    413: "The body is too large.",
    429: "The API key, or everybody together, has used what they may.",
    431: "The headers are too many or too large.",
    500: "The cluster lost the request, or has a bug.",
    503: "A queue is full, or no replica can take the request yet.",
    504: "The request's deadline passed.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_TIMELINE_LINK = {
    "timeline": {
        "operationId": "get_v1_requests_request_id_timeline",
        "parameters": {"request_id": f"$response.header.{HEADER}"},
        "description": "Where the time of this request went.",
    }
}
_DESCRIPTION = (
    "OpenAI's API, Anthropic's messages, and what those who run the cluster ask it. Unknown fields are errors; `null` "
    "means not given. Every answer has the header `X-Request-Id`: the request's own, if it is fit, or a new one."
)


def openapi_document(routes: Iterable[BaseRoute], *, model: str) -> Json:
    """The document. `model`: the served model's name, for examples, and the only value that `model` fields take."""
    described = [(route, operation) for route in routes if (operation := operation_of(route)) is not None]
    paths: dict[str, Json] = {}
    for route, operation in described:
        template = re.sub(r"{(\w+):path}", r"{\1}", getattr(route, "path", ""))
        for method in sorted(getattr(route, "methods", None) or ()):
            paths.setdefault(template, {})[method.lower()] = _operation(operation, template, method, model)
    return {
        "openapi": "3.1.0",
        "info": {"title": "atom_cluster", "version": __version__, "description": _DESCRIPTION},
        "paths": paths,
        "components": {
            "schemas": _schemas([operation for _, operation in described], model),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def _schemas(operations: Iterable[Operation], model: str) -> Json:
    types: set[type] = {ErrorBody, MessagesError}
    for operation in operations:
        types |= {it for it in (operation.request, operation.answer, *operation.events) if isinstance(it, type)}
    found = components(types)
    for operation in operations:
        if operation.request is not None:
            field = found[operation.request.__name__].get("properties", {}).get("model")
            if field is not None:
                field["enum"] = [model] if field.get("type") == "string" else [model, None]
    return found


def _operation(operation: Operation, path: str, method: str, model: str) -> Json:
    result: Json = {
        "operationId": f"{method.lower()}{re.sub(r'[^A-Za-z0-9]+', '_', path)}".rstrip("_"),
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": _parameters(operation),
        "responses": {"200": _answer(operation, model)},
    }
    if operation.description:
        result["description"] = operation.description
    if operation.is_open:
        result["security"] = []
    if operation.takes_terms:
        result["responses"]["200"]["links"] = _TIMELINE_LINK
    if operation.request is not None:
        result["requestBody"] = _body(operation, model)
    for status in operation.errors:
        result["responses"][str(status)] = _error(status, path)
    return result


def _parameters(operation: Operation) -> list[Json]:
    found: list[Json] = [
        {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
        for name, text in operation.path_params.items()
    ]
    found.append(_header(HEADER, "What to call the request in logs, traces and its answer.", {"type": "string"}))
    if operation.takes_terms:
        timeout = {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS}
        priority = {"type": "integer", "minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY}
        found.append(_header(TIMEOUT_HEADER, "When to give up, in milliseconds from the request's arrival.", timeout))
        words = "Lower runs first; 0 is usual. The body's `priority` wins. An API key may ask for some only."
        found.append(_header(PRIORITY_HEADER, words, priority))
    return found


def _header(name: str, description: str, schema: Json) -> Json:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def _body(operation: Operation, model: str) -> Json:
    assert operation.request is not None
    content: Json = {"schema": reference(operation.request)}
    if operation.examples:
        content["examples"] = {
            _name(example): {"summary": example.summary, "value": with_model(example.request, model)}
            for example in operation.examples
        }
    return {"required": not operation.is_body_optional, "content": {"application/json": content}}


def _answer(operation: Operation, model: str) -> Json:
    schema: Json = {"type": "string"}
    if isinstance(operation.answer, type):
        schema = reference(operation.answer)
    elif operation.answer is not None:
        schema = dict(operation.answer)
    content: dict[str, Json] = {operation.media_type: {"schema": schema, **_examples(operation, model)}}
    if operation.events:
        events = {"x-event-data": [reference(kind) for kind in operation.events]}
        content["text/event-stream"] = {
            "schema": {"type": "string"},
            **events,
            **_examples(operation, model, streamed=True),
        }
    return {"description": "Done.", "content": content, "headers": {HEADER: {"schema": {"type": "string"}}}}


def _examples(operation: Operation, model: str, *, streamed: bool = False) -> Json:
    found = {
        _name(example): {"summary": example.summary, "value": with_model(example.answer, model)}
        for example in operation.examples
        if example.is_streamed is streamed
    }
    return {"examples": found} if found else {}


def _error(status: int, path: str) -> Json:
    kind = MessagesError if speaks_anthropic({"path": path}) else ErrorBody
    result: Json = {
        "description": _ERRORS[status],
        "content": {"application/json": {"schema": reference(kind)}},
    }
    if status in (429, 503):
        result["headers"] = _RETRY_AFTER
    return result


def _name(example: Example) -> str:
    return re.sub(r"[^a-z0-9]+", "-", example.summary.lower()).strip("-")


def with_model(value: Any, model: str) -> Any:
    """An example with the served model's name in it."""
    if isinstance(value, str):
        return value.replace(SERVED_MODEL, model)
    if isinstance(value, dict):
        return {key: with_model(entry, model) for key, entry in value.items()}
    return [with_model(entry, model) for entry in value] if isinstance(value, list | tuple) else value
