"""POST /start_profile and /stop_profile: profiler windows of running engines, for people who look at their speed.

Refused unless the configuration names a directory for traces. Knows nothing of engines or of what is in a trace.
"""

from __future__ import annotations

from typing import TypeVar

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from atom_cluster.api.context import ApiContext
from atom_cluster.api.http.error_responses import json_response
from atom_cluster.api.http.request_body import read_json_body, validate
from atom_cluster.api.openapi.operating import START_PROFILE, STOP_PROFILE
from atom_cluster.api.openapi.operation import described
from atom_cluster.api.operating.profile_types import ProfileRequest, ProfileTarget

BodyT = TypeVar("BodyT", bound="ProfileTarget")


def add_profile_routes(app: FastAPI, context: ApiContext) -> None:
    """Both routes. A body is optional."""
    generator, limits = context.generator, context.limits

    async def read(model: type[BodyT], request: Request) -> BodyT:
        if request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
            return model()
        body = await read_json_body(request, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
        if "model" in body and body.keys() & {"prompt", "messages"}:
            # The load generators of vLLM and ATOM start and stop profiles with the call that they generate with.
            return model()
        return validate(model, body)

    async def start(request: Request) -> Response:
        return json_response(await generator.start_profile(await read(ProfileRequest, request)))

    async def stop(request: Request) -> Response:
        return json_response(await generator.stop_profile(await read(ProfileTarget, request)))

    app.post("/start_profile", **described(START_PROFILE))(start)
    app.post("/stop_profile", **described(STOP_PROFILE))(stop)
