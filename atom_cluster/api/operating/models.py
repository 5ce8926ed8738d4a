"""GET /v1/models and /v1/models/{id}: the one model that is served."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import Response

from atom_cluster.api.context import ApiContext
from atom_cluster.api.http.error_responses import json_response
from atom_cluster.api.openai.wire import ModelCard, ModelList
from atom_cluster.api.openapi.operating import MODEL, MODELS
from atom_cluster.api.openapi.operation import described


def add_model_routes(app: FastAPI, context: ApiContext) -> None:
    """Both routes."""
    model = context.model
    card = ModelCard(id=model.name, created=model.created, max_model_len=model.max_model_len)

    async def list_models() -> Response:
        return json_response(ModelList(data=[card]))

    async def get_model(model_id: str) -> Response:
        context.check_model(model_id)
        return json_response(card)

    app.get("/v1/models", **described(MODELS))(list_models)
    app.get("/v1/models/{model_id:path}", **described(MODEL))(get_model)
