"""ApiContext: what the handlers of all routes share. Knows no route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from atom_cluster.api.answers.grammars import GrammarService
from atom_cluster.api.generator import Generator
from atom_cluster.api.http.request_body import read_json_body, validate
from atom_cluster.api.http.request_record import note_checked
from atom_cluster.api.parsers.dialect import Dialect
from atom_cluster.api.text.model_files import ServedModel
from atom_cluster.api.text.tokenizer import TokenizerService
from atom_cluster.config.serving import ApiConfig
from atom_cluster.errors import UnknownModel
from atom_cluster.observability.metrics import MetricSink

BodyT = TypeVar("BodyT", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiContext:
    """The cluster behind the API, its model, and the API's limits."""

    generator: Generator
    tokenizer: TokenizerService
    model: ServedModel
    limits: ApiConfig
    metrics: MetricSink
    dialect: Dialect
    """How the model writes reasoning and tool calls."""
    grammars: GrammarService
    """Compiles what outputs have to look like."""

    async def read(self, model: type[BodyT], request: Request) -> BodyT:
        """The body, checked against its schema. Raises `InvalidRequest` and its kin."""
        limits = self.limits
        body = await read_json_body(request, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
        checked = validate(model, body)
        note_checked(request.scope)
        return checked

    def check_model(self, name: str) -> None:
        """Raise `UnknownModel` unless `name` is the model served here."""
        if name != self.model.name:
            raise UnknownModel(f"the model {name[:100]!r} is not served here", param="model")
