"""GET /v1/requests/{id}/timeline: where the time of one of the latest requests went. Knows not how that is known."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import Response

from atom_cluster.api.context import ApiContext
from atom_cluster.api.openapi.operating import TIMELINE
from atom_cluster.api.openapi.operation import described
from atom_cluster.errors import UnknownRequest
from atom_cluster.observability.timeline_store import TimelineStore

PATH = "/v1/requests/{request_id}/timeline"


def add_timeline_routes(app: FastAPI, context: ApiContext, store: TimelineStore) -> None:
    """The route."""

    async def timeline(request_id: str) -> Response:
        state, text = store.find(request_id)
        if state == "kept":
            return Response(text, media_type="application/json")
        if state == "running":
            raise _running(request_id)
        found = await context.generator.find_timeline(request_id)
        if found.text is not None:
            return Response(found.text, media_type="application/json")
        if found.is_running:
            raise _running(request_id)
        where = "this ingress" if not found.num_asked else f"this ingress and {found.num_asked} others"
        silent = f" {', '.join(found.silent)} did not answer." if found.silent else ""
        raise UnknownRequest(
            f"no timeline of a request {request_id[:100]!r} is kept by {where}. Each keeps its last"
            f" {store.max_timelines} that began to generate, in memory.{silent}",
            param="id",
        )

    app.get(PATH, **described(TIMELINE))(timeline)


def _running(request_id: str) -> UnknownRequest:
    return UnknownRequest(
        f"the request {request_id[:100]!r} is still running; its timeline is there when it has ended", param="id"
    )
