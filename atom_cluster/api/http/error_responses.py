"""Errors become OpenAI error bodies with their status and headers, for our own errors and the framework's alike.

On routes that speak Anthropic's API they have its form.
"""

from __future__ import annotations

import math

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from atom_cluster.api.anthropic.errors import messages_error, speaks_anthropic
from atom_cluster.api.http.error_ledger import ErrorLedger
from atom_cluster.api.http.request_id import missing_header, request_id
from atom_cluster.api.http.request_record import note_failure
from atom_cluster.api.openai.wire import ErrorBody, ErrorDetail
from atom_cluster.errors import AtomClusterError, BodyTimeout, InvalidRequest, Overloaded, RequestTooLarge
from atom_cluster.observability.logging import get_logger
from atom_cluster.observability.metrics import MetricSink

logger = get_logger(__name__)

CLIENT_GONE_STATUS = 499
"""Recorded for a client that left before its answer began; never sent."""


def error_body(error: BaseException) -> ErrorBody:
    """Body for an error. What is not one of ours is a bug, whose text is for the log and not for clients."""
    if not isinstance(error, AtomClusterError):
        return ErrorBody(
            error=ErrorDetail(message="internal error", type="internal_error", param=None, code="internal_error")
        )
    param = error.param if isinstance(error, InvalidRequest) else None
    return ErrorBody(
        error=ErrorDetail(message=str(error), type=error.error_type, param=param, code=error.code),
    )


def status_of(error: BaseException) -> int:
    """HTTP status of an error."""
    return error.http_status if isinstance(error, AtomClusterError) else 500


def error_response(error: BaseException, *, scope: Scope) -> Response:
    """Response for an error of the request that `scope` describes: status, body in the form that its route's clients
    expect, and `Retry-After` where trying again helps."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, (RequestTooLarge, BodyTimeout)):
        # The rest of the body is not worth reading just to keep the connection.
        headers["Connection"] = "close"
    if not isinstance(error, AtomClusterError):
        # The framework answers these outside of the middleware that would say it.
        headers |= missing_header(scope)
    return _worded(error_body(error), scope=scope, status=status_of(error), headers=headers)


def json_response(body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Response with a JSON body, encoded by msgspec."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def install_error_handlers(app: FastAPI, metrics: MetricSink) -> None:
    """Make every error of `app`, unknown paths and wrong methods included, answer in OpenAI's form.

    `app.state.errors` is their `ErrorLedger` from then on.
    """
    app.state.errors = ErrorLedger(metrics)
    app.add_exception_handler(AtomClusterError, _handle)
    app.add_exception_handler(HTTPException, _handle_framework)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)
    app.add_exception_handler(Exception, _handle)


async def _handle(request: Request, error: Exception) -> Response:
    if not isinstance(error, InvalidRequest | Overloaded):
        log = logger.bind(request_id=request_id(request.scope))
        log.error("%s %s failed: %r", request.method, request.url.path, error)
    request.app.state.errors.note(error)
    note_failure(request.scope, error)
    return error_response(error, scope=request.scope)


async def _handle_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    detail = ErrorDetail(message=message, type="invalid_request_error", param=None, code=code)
    headers = dict(error.headers) if error.headers else None
    return _worded(ErrorBody(error=detail), scope=request.scope, status=error.status_code, headers=headers)


def _worded(body: ErrorBody, *, scope: Scope, status: int, headers: dict[str, str] | None) -> Response:
    worded: object = body
    if speaks_anthropic(scope):
        worded = messages_error(body.error, status=status, request_id=request_id(scope))
    return json_response(worded, status=status, headers=headers)


async def _handle_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)
