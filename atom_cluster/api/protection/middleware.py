"""ASGI middleware around the whole API: every request passes the gate, or is answered with why it does not.

Whoever handles the request finds the name of its key in `scope["state"]["api_key_name"]`, how urgent it may be in
`RequestTerms`, and tells with `note_used` what it has used. Knows nothing of keys or limits.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atom_cluster.api.http.error_ledger import note_error
from atom_cluster.api.http.error_responses import error_response
from atom_cluster.api.http.request_record import note_failure
from atom_cluster.api.http.request_terms import PRIORITY_LIMIT
from atom_cluster.api.protection.access import access_of
from atom_cluster.api.protection.gate import Gate, Pass, Visit
from atom_cluster.errors import AtomClusterError, Unauthorized

_STATE = "api_pass"


class Protection:
    """Asks the gate before the application sees a request."""

    def __init__(self, app: ASGIApp, *, gate: Gate, routes: Sequence[BaseRoute]) -> None:
        """routes: the application's."""
        self._app = app
        self._gate = gate
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on, or answer it."""
        if scope["type"] == "websocket":
            # There are none, and one that somebody adds shall not be open.
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            found = await self._gate.enter(self._visit(scope))
        except AtomClusterError as exc:
            note_error(scope, exc)
            note_failure(scope, exc)
            response = error_response(exc, scope=scope)
            if isinstance(exc, Unauthorized):
                response.headers["WWW-Authenticate"] = _challenge(scope)
            await response(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state[_STATE] = found
        state["api_key_name"] = found.key_name
        state[PRIORITY_LIMIT] = found.priority_limit

        async def telling_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(found.headers)
            await send(message)

        try:
            await self._app(scope, receive, telling_send if found.headers else send)
        finally:
            self._gate.close(found)

    def _visit(self, scope: Scope) -> Visit:
        client = scope.get("client")
        return Visit(
            method=scope["method"],
            target_bytes=len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b"")),
            headers=scope["headers"],
            access=access_of(self._template(scope)),
            client=client[0] if client else None,
        )

    def _template(self, scope: Scope) -> str | None:
        """The path template of the route that will answer; also noted in the scope, for whoever counts answers."""
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is not Match.NONE:
                scope["route"] = route
                return str(getattr(route, "path", ""))
        return None


def note_used(scope: Scope, *, num_prompt_tokens: int, num_output_tokens: int) -> None:
    """Tell what a request has used, besides what was told before. To be called before its answer has ended."""
    found = scope.get("state", {}).get(_STATE)
    if isinstance(found, Pass) and found.admission is not None:
        found.admission.note_used(num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens)


def _challenge(scope: Scope) -> str:
    """How to come back: browsers ask their users when the scheme is Basic, programs read the other one."""
    accepts = next((value for name, value in scope["headers"] if name == b"accept"), b"")
    return 'Basic realm="atom_cluster"' if b"text/html" in accepts and scope["method"] == "GET" else "Bearer"
