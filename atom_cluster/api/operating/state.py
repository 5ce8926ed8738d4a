"""GET /health, /ready, /v1/cluster and /metrics: what those who run the cluster ask it."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from atom_cluster.api.context import ApiContext
from atom_cluster.api.http.error_responses import error_response, json_response
from atom_cluster.api.openapi.operating import CLUSTER, HEALTH, METRICS, READY
from atom_cluster.api.openapi.operation import described
from atom_cluster.errors import NotReady


def add_state_routes(app: FastAPI, context: ApiContext) -> None:
    """All four routes."""
    generator = context.generator

    async def health() -> Response:
        return json_response({"status": "ok"})

    async def ready(request: Request) -> Response:
        try:
            await generator.check_ready()
        except NotReady as exc:
            # What a probe asks for: no error of anybody's, and not to be listed among those.
            return error_response(exc, scope=request.scope)
        return json_response({"status": "ready"})

    async def cluster() -> Response:
        errors = app.state.errors.recent.notes()
        return json_response({**generator.cluster_state(), "api": context.dialect.choices, "recent_errors": errors})

    async def metrics_text() -> Response:
        return Response(await generator.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.get("/health", **described(HEALTH))(health)
    app.get("/ready", **described(READY))(ready)
    app.get("/v1/cluster", **described(CLUSTER))(cluster)
    app.get("/metrics", **described(METRICS))(metrics_text)
