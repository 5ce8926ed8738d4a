"""Errors in OpenAI's form."""

from __future__ import annotations

import json

import pytest

from atom_cluster.api.http.error_responses import error_response
from atom_cluster.errors import (
    AtomClusterError,
    ContextLengthExceeded,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestFailed,
    RequestTimeout,
    RequestTooLarge,
    UnknownModel,
)

SCOPE = {"type": "http", "path": "/v1/completions"}


@pytest.mark.parametrize(
    ("error", "status", "type_", "code"),
    [
        (InvalidRequest("m", param="p"), 400, "invalid_request_error", None),
        (ContextLengthExceeded("m", param="p"), 400, "invalid_request_error", "context_length_exceeded"),
        (UnknownModel("m", param="p"), 404, "invalid_request_error", "model_not_found"),
        (RequestTooLarge("m"), 413, "invalid_request_error", "request_too_large"),
        (Overloaded("m"), 503, "overloaded_error", "queue_full"),
        (NotReady("m"), 503, "overloaded_error", "not_ready"),
        (RequestFailed("m"), 500, "internal_error", "request_failed"),
        (RequestTimeout("m"), 504, "internal_error", "request_timeout"),
    ],
)
def test_each_error_has_status_type_and_code(error: AtomClusterError, status: int, type_: str, code: str) -> None:
    response = error_response(error, scope=SCOPE)
    body = json.loads(response.body)["error"]
    assert response.status_code == status
    assert body == {"message": "m", "type": type_, "param": getattr(error, "param", None), "code": code}


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    assert error_response(Overloaded("m", retry_after_s=2.1), scope=SCOPE).headers["Retry-After"] == "3"
    assert error_response(Overloaded("m", retry_after_s=0.0), scope=SCOPE).headers["Retry-After"] == "1"
    assert "Retry-After" not in error_response(InvalidRequest("m"), scope=SCOPE).headers


def test_the_text_of_a_bug_stays_in_the_log() -> None:
    response = error_response(KeyError("secret"), scope=SCOPE)
    assert response.status_code == 500
    assert b"secret" not in response.body
