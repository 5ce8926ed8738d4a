"""ASGI middleware that gives every HTTP request an id: the client's `X-Request-Id` if it is fit for logs, or a new one.

Whoever handles the request reads it with `request_id`; the answer's headers repeat it, whatever the answer is. Two
requests may have the same id, even at once: engines know requests by ids of our own. Knows nothing of what they do.
"""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atom_cluster.api.anthropic.errors import speaks_anthropic

HEADER = "X-Request-Id"
ANTHROPIC_HEADER = "request-id"
"""What clients of Anthropic's API look for."""
MAX_CHARS = 128
_FIT = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:+=@-]{{0,{MAX_CHARS - 1}}}")
"""No spaces, quotes, slashes or line ends: an id stands in log lines, paths and headers as it is."""


class RequestIds:
    """Puts the id into `scope["state"]["request_id"]`, which is `request.state.request_id`, and into the answer."""

    def __init__(self, app: ASGIApp, *, proxy_answers: bool = False) -> None:
        """`proxy_answers`: a proxy in front, such as Ray Serve's, adds the header to answers; two would be one too
        many."""
        self._app = app
        self._proxy_answers = proxy_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on with its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        found = _chosen_id(scope)
        scope.setdefault("state", {}).update(request_id=found, proxy_answers_id=self._proxy_answers)

        async def naming_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                if not self._proxy_answers:
                    MutableHeaders(scope=message)[HEADER] = found
                if speaks_anthropic(scope):
                    MutableHeaders(scope=message)[ANTHROPIC_HEADER] = found
            await send(message)

        await self._app(scope, receive, naming_send)


def request_id(scope: Scope) -> str:
    """The id of the request that `scope` describes; empty outside of `RequestIds`."""
    return str(scope.get("state", {}).get("request_id", ""))


def missing_header(scope: Scope) -> dict[str, str]:
    """The header with the id, for answers that are made outside of `RequestIds`; none where a proxy adds it."""
    found = request_id(scope)
    return {HEADER: found} if found and not scope["state"].get("proxy_answers_id") else {}


def _chosen_id(scope: Scope) -> str:
    wanted = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(wanted) == 1 and _FIT.fullmatch(text := str(wanted[0], "latin-1")):
        return text
    return f"req-{uuid.uuid4().hex}"
