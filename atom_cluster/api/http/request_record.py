"""ASGI middleware that records each HTTP request from its first byte to the last of its answer, and tells of it after.

What it cannot see itself, handlers write into the record: `record_of` finds it. When the request has ended, the record
becomes a timeline, a trace and a line of the access log. Knows nothing of what handlers do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atom_cluster.api.answers.outputs import Output
from atom_cluster.api.http.request_id import request_id
from atom_cluster.observability.access_log import AccessLog
from atom_cluster.observability.timeline import RequestRecord, compose
from atom_cluster.observability.timeline_store import TimelineStore
from atom_cluster.observability.tracing import Tracer

_STATE = "request_record"
_CLIENT_GONE_STATUS = 499
"""As in `error_responses`, which uses this module."""
_BUG_STATUS = 500
_MAX_TRACEPARENT_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """Where records of requests go. `access_log` and `tracer`: None for none."""

    ingress: str
    """Name of this process."""
    store: TimelineStore
    access_log: AccessLog | None = None
    tracer: Tracer | None = None

    def begin(self, record: RequestRecord, outputs: Sequence[Output], *, num_per_prompt: int) -> None:
        """A request begins to generate these outputs, so many for each prompt."""
        requests = [output.request for output in outputs]
        # Of the first output's id, what comes before its index is the answer's.
        record.answer_id = requests[0].request_id.rpartition("-")[0]
        record.outputs = [request.record for request in requests]
        record.num_prompt_tokens = sum(len(request.token_ids) for request in requests[::num_per_prompt])
        for request in requests:
            request.record.client_request_id = record.request_id
        self.store.begin(record)

    def end(self, record: RequestRecord) -> None:
        """A request has ended."""
        if record.outputs:
            errors = (output.attempts[-1].error for output in record.outputs if output.attempts)
            record.error = record.error or next(filter(None, errors), "")
            timeline = compose(record, ingress=self.ingress)
            self.store.end(timeline)
            if self.tracer is not None:
                self.tracer.trace(record, timeline)
        if self.access_log is not None:
            self.access_log.write(record)


class RequestRecords:
    """Puts a `RequestRecord` into the scope of each request, for `record_of`."""

    def __init__(self, app: ASGIApp, *, recorder: Recorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on; tell of it when it has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(
            arrived_s=time.monotonic(),
            created=time.time(),
            method=scope["method"],
            traceparent=_traceparent(scope),
            status=_CLIENT_GONE_STATUS,
        )
        scope.setdefault("state", {})[_STATE] = (self._recorder, record)

        async def noting_receive() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body") and record.read_s is None:
                record.read_s = time.monotonic()
            return message

        async def noting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await self._app(scope, noting_receive, noting_send)
        except Exception as exc:
            # The framework answers it further out, unless the answer has begun.
            record.error = type(exc).__name__
            record.status = _BUG_STATUS if record.status == _CLIENT_GONE_STATUS else record.status
            raise
        finally:
            record.ended_s = time.monotonic()
            record.request_id = request_id(scope)
            record.key_name = str(scope["state"].get("api_key_name") or "")
            # The template, not the path: what clients make up is not for logs.
            record.route = getattr(scope.get("route"), "path", "unknown")
            self._recorder.end(record)


def note_outputs(scope: Scope, outputs: Sequence[Output], *, num_per_prompt: int) -> None:
    """Note that a request begins to generate. Nothing happens outside of `RequestRecords`, here and below."""
    found = scope.get("state", {}).get(_STATE)
    if found is not None:
        recorder, record = found
        record.request_id = request_id(scope)
        recorder.begin(record, outputs, num_per_prompt=num_per_prompt)


def note_finished(scope: Scope, outputs: Sequence[Output]) -> None:
    """Note how outputs ended, as far as they did."""
    found = scope.get("state", {}).get(_STATE)
    if found is not None:
        found[1].finish_reasons = tuple(output.finish_reason or "none" for output in outputs)


def note_checked(scope: Scope) -> None:
    """Note that a request's body has been checked."""
    found = scope.get("state", {}).get(_STATE)
    if found is not None:
        found[1].checked_s = time.monotonic()


def note_failure(scope: Scope, error: BaseException) -> None:
    """Note why a request ends without its answer."""
    found = scope.get("state", {}).get(_STATE)
    if found is not None:
        found[1].error = type(error).__name__


def _traceparent(scope: Scope) -> str:
    """The header, if it is there once and could be one."""
    values = [value for name, value in scope["headers"] if name == b"traceparent"]
    if len(values) != 1 or len(values[0]) > _MAX_TRACEPARENT_BYTES:
        return ""
    return str(values[0], "latin-1")
