"""Checks of answers to requests that schemathesis makes up from our page. It finds them here by their names."""

from __future__ import annotations

import schemathesis
from schemathesis import Case, Response
from schemathesis.checks import CheckContext
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from atom_cluster.api.http.request_terms import TIMEOUT_HEADER


@schemathesis.check
def server_is_not_at_fault(context: CheckContext, response: Response, case: Case) -> None:
    """No 5xx, but for a deadline that the request gave itself."""
    has_deadline = any(name.lower() == TIMEOUT_HEADER.lower() for name in case.headers or {})
    assert response.status_code < 500 or (response.status_code == 504 and has_deadline), "the server is at fault"


@schemathesis.check
def json_conformance(context: CheckContext, response: Response, case: Case) -> bool | None:
    """As the page says, if it is JSON. It calls a stream of events a string; the fuzzer would check each event."""
    is_json = response.headers["content-type"] == ["application/json"]
    return response_schema_conformance(context, response, case) if is_json else None


CHECKS = [server_is_not_at_fault, status_code_conformance, content_type_conformance, json_conformance]
