"""Errors become OpenAI error bodies with their status and headers, for our own errors and the framework's alike."""

from __future__ import annotations

import logging
import math

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from atom_cluster.api.wire import ErrorBody, ErrorDetail
from atom_cluster.errors import AtomClusterError, BodyTimeout, InvalidRequest, Overloaded, RequestTooLarge

logger = logging.getLogger(__name__)

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


def error_response(error: BaseException) -> Response:
    """Response for an error: status, body, and `Retry-After` where trying again helps."""
    status = error.http_status if isinstance(error, AtomClusterError) else 500
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, (RequestTooLarge, BodyTimeout)):
        # The rest of the body is not worth reading just to keep the connection.
        headers["Connection"] = "close"
    return json_response(error_body(error), status=status, headers=headers)


def json_response(body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Response with a JSON body, encoded by msgspec."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of `app`, unknown paths and wrong methods included, answer in OpenAI's form."""
    app.add_exception_handler(AtomClusterError, _handle)
    app.add_exception_handler(HTTPException, _handle_framework)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)
    app.add_exception_handler(Exception, _handle)


async def _handle(request: Request, error: Exception) -> Response:
    if not isinstance(error, InvalidRequest | Overloaded):
        logger.error("%s %s failed: %r", request.method, request.url.path, error)
    return error_response(error)


async def _handle_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    detail = ErrorDetail(message=message, type="invalid_request_error", param=None, code=code)
    headers = dict(error.headers) if error.headers else None
    return json_response(ErrorBody(error=detail), status=error.status_code, headers=headers)


async def _handle_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)
