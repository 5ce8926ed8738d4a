"""Errors as clients of Anthropic's API expect them, on the routes that speak it. Knows no exception."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from starlette.types import Scope

from atom_cluster.api.openai.wire import ErrorDetail, TypedEvent

_PATH = "/v1/messages"
_TYPE_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class MessagesErrorDetail(Struct, frozen=True, kw_only=True):
    """What went wrong."""

    type: str
    """Which class of errors it belongs to."""
    message: str
    """For people. Begins with the field that is wrong."""


class MessagesError(TypedEvent, frozen=True, kw_only=True):
    """Body of every answer of these routes with an error status, and of an error event within a stream."""

    type: Literal["error"] = "error"
    error: MessagesErrorDetail
    """What went wrong."""
    request_id: str
    """As in the header `request-id`."""


def speaks_anthropic(scope: Scope) -> bool:
    """Whether a request is to one of the routes whose clients expect Anthropic's form."""
    path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
    return bool(path == _PATH or path.startswith(_PATH + "/"))


def messages_error(detail: ErrorDetail, *, status: int, request_id: str) -> MessagesError:
    """The same error in Anthropic's form, which has no place for the field's name but its message."""
    kind = _TYPE_BY_STATUS.get(status, "invalid_request_error" if status < 500 else "api_error")
    is_named = detail.param is None or detail.param in detail.message
    message = detail.message if is_named else f"{detail.param}: {detail.message}"
    return MessagesError(error=MessagesErrorDetail(type=kind, message=message), request_id=request_id)
