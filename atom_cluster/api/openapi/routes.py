"""GET /openapi.json and /docs: what this API offers, for programs and for people."""

from __future__ import annotations

from functools import cache

import msgspec
from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

from atom_cluster.api.context import ApiContext
from atom_cluster.api.openapi.document import Json, openapi_document
from atom_cluster.api.openapi.operation import Operation, described
from atom_cluster.api.openapi.page import CONTENT_POLICY, html_page


def add_openapi_routes(app: FastAPI, context: ApiContext) -> None:
    """Both routes. They describe every route of the app, whenever it was added, when they are first asked."""

    @cache
    def document() -> Json:
        return openapi_document(app.routes, model=context.model.name)

    @cache
    def as_json() -> bytes:
        return msgspec.json.encode(document())

    @cache
    def as_html() -> str:
        return html_page(document())

    # In the tokenizer's threads, since making it takes a moment, and the event loop has streams to serve.

    async def openapi_json() -> Response:
        return Response(await context.tokenizer.run(as_json), media_type="application/json")

    async def docs() -> Response:
        page = await context.tokenizer.run(as_html)
        return HTMLResponse(page, headers={"Content-Security-Policy": CONTENT_POLICY})

    app.get("/openapi.json", **described(_JSON))(openapi_json)
    app.get("/docs", **described(_HTML))(docs)


_JSON = Operation(tag="Operation", summary="This description, as OpenAPI 3.1", answer={"type": "object"})
_HTML = Operation(tag="Operation", summary="This description, for people", media_type="text/html")
