"""ASGI middleware that counts HTTP requests by route and status. Knows nothing of what they do."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atom_cluster.api.http.error_responses import CLIENT_GONE_STATUS, status_of
from atom_cluster.observability.metrics import HTTP_REQUESTS, HTTP_REQUESTS_OPEN, MetricSink


class RequestCounter:
    """Records `HTTP_REQUESTS` and `HTTP_REQUESTS_OPEN` around an application."""

    def __init__(self, app: ASGIApp, *, metrics: MetricSink) -> None:
        self._app = app
        self._metrics = metrics
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on; count it when it ends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._change_open(1)
        unanswered_status = CLIENT_GONE_STATUS
        try:
            await self._app(scope, receive, noting_send)
        except Exception as exc:
            # A bug; the framework answers it further out, unless the answer has begun.
            unanswered_status = status_of(exc)
            raise
        finally:
            self._change_open(-1)
            # The template, not the path: clients must not be able to make up label values.
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.inc(HTTP_REQUESTS, route=route, status=str(status or unanswered_status))

    def _change_open(self, change: int) -> None:
        self._num_open += change
        self._metrics.set(HTTP_REQUESTS_OPEN, self._num_open)
