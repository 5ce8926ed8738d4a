"""Stop 3 of 14: an HTTP request is checked and answered. Next: api/chat_template.py and api/tokenizer.py.

`create_app` makes the whole HTTP API over a `Generator`; `serving/ingress.py` hosts it. Knows nothing of Ray, engines
or where tokens come from.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from atom_cluster.api.answer import Answer, AnswerPlan
from atom_cluster.api.error_responses import install_error_handlers, json_response
from atom_cluster.api.formats import AnswerFormat, AnswerHeader, ChatFormat, CompletionFormat
from atom_cluster.api.generator import Generator
from atom_cluster.api.model_files import ServedModel
from atom_cluster.api.openai_types import ChatCompletionRequest, CompletionRequest, GenerationFields
from atom_cluster.api.outputs import Output
from atom_cluster.api.profiling import add_profile_routes
from atom_cluster.api.prompts import chat_prompt, completion_prompts
from atom_cluster.api.request_body import read_json_body, validate
from atom_cluster.api.request_counter import RequestCounter
from atom_cluster.api.sampling import check_request, output_inputs, sampling_params
from atom_cluster.api.tokenizer import TokenizerService
from atom_cluster.api.wire import ModelCard, ModelList
from atom_cluster.config.serving import ApiConfig
from atom_cluster.errors import UnknownModel
from atom_cluster.observability.metrics import MetricSink, NullMetrics


def create_app(
    *,
    generator: Generator,
    tokenizer: TokenizerService,
    model: ServedModel,
    limits: ApiConfig,
    metrics: MetricSink | None = None,
) -> FastAPI:
    """The HTTP API. The caller keeps ownership of `generator` and `tokenizer` and closes them after the app."""
    routes = _Routes(
        generator=generator,
        tokenizer=tokenizer,
        model=model,
        limits=limits,
        metrics=metrics or NullMetrics(),
    )
    app = FastAPI(title="atom_cluster", docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app)
    app.add_middleware(RequestCounter, metrics=routes.metrics)
    app.post("/v1/chat/completions")(routes.chat_completions)
    app.post("/v1/completions")(routes.completions)
    app.get("/v1/models")(routes.list_models)
    app.get("/v1/models/{model_id:path}")(routes.get_model)
    app.get("/v1/cluster")(routes.cluster)
    app.get("/health")(routes.health)
    app.get("/ready")(routes.ready)
    app.get("/metrics")(routes.metrics_text)
    add_profile_routes(app, generator, limits)
    return app


@dataclass(frozen=True, slots=True, kw_only=True)
class _Routes:
    """The handlers and what they share."""

    generator: Generator
    tokenizer: TokenizerService
    model: ServedModel
    limits: ApiConfig
    metrics: MetricSink

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        arrived_at_s = time.monotonic()
        body = validate(ChatCompletionRequest, await self._read(request))
        check_request(body, model=self.model, limits=self.limits)
        prompt = await self.tokenizer.run(
            lambda: chat_prompt(
                body,
                tokenizer=self.tokenizer.tokenizer,
                template=self.tokenizer.chat_template,
                max_tokens=self.model.max_model_len,
            )
        )
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        words = ChatFormat(self._header(answer_id, body), self.tokenizer.tokenizer)
        return self._answer(body, [prompt], answer_id, words, arrived_at_s=arrived_at_s)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        arrived_at_s = time.monotonic()
        body = validate(CompletionRequest, await self._read(request))
        check_request(body, model=self.model, limits=self.limits)
        prompts = await self.tokenizer.run(
            lambda: completion_prompts(body, tokenizer=self.tokenizer.tokenizer, max_tokens=self.model.max_model_len)
        )
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        words = CompletionFormat(self._header(answer_id, body), self.tokenizer.tokenizer)
        return self._answer(body, prompts, answer_id, words, arrived_at_s=arrived_at_s)

    async def list_models(self) -> Response:
        """GET /v1/models."""
        return json_response(ModelList(data=[self._model_card()]))

    async def get_model(self, model_id: str) -> Response:
        """GET /v1/models/{id}."""
        if model_id != self.model.name:
            raise UnknownModel(f"the model {model_id[:100]!r} is not served here", param="model")
        return json_response(self._model_card())

    async def cluster(self) -> Response:
        """GET /v1/cluster: replicas, roles, load, and why each choice was made."""
        return json_response(self.generator.cluster_state())

    async def health(self) -> Response:
        """GET /health: this process answers. Says nothing of the engines; see /ready."""
        return json_response({"status": "ok"})

    async def ready(self) -> Response:
        """GET /ready: a generation goes through, or 503."""
        await self.generator.check_ready()
        return json_response({"status": "ready"})

    async def metrics_text(self) -> Response:
        """GET /metrics, for Prometheus."""
        return Response(await self.generator.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _read(self, request: Request) -> dict[str, object]:
        return await read_json_body(request, max_bytes=self.limits.max_body_bytes, timeout_s=self.limits.body_timeout_s)

    def _header(self, answer_id: str, body: ChatCompletionRequest | CompletionRequest) -> AnswerHeader:
        return AnswerHeader(
            id=answer_id,
            created=int(time.time()),
            model=self.model.name,
            usage_in_stream=_wants_usage(body),
            has_logprobs=body.logprobs is not None and body.logprobs is not False,
        )

    def _answer(
        self,
        body: GenerationFields,
        prompts: Sequence[tuple[int, ...]],
        answer_id: str,
        words: AnswerFormat,
        *,
        arrived_at_s: float,
    ) -> Answer:
        params = sampling_params(body, model=self.model)
        prompt_param = "messages" if isinstance(body, ChatCompletionRequest) else "prompt"
        inputs = output_inputs(
            params, prompts, answer_id=answer_id, model=self.model, limits=self.limits, prompt_param=prompt_param
        )
        eos = frozenset(self.model.eos_token_ids)
        plan = AnswerPlan(
            outputs=[
                Output(index, entry, self.tokenizer.tokenizer, stop=params.stop_strings, eos=eos)
                for index, entry in enumerate(inputs)
            ],
            num_outputs_per_prompt=params.n,
            words=words,
            is_streamed=bool(body.stream),
            usage_in_stream=_wants_usage(body),
            arrived_at_s=arrived_at_s,
        )
        return Answer(
            plan,
            generator=self.generator,
            metrics=self.metrics,
            coalesce_s=self.limits.coalesce_ms / 1000,
            write_timeout_s=self.limits.write_timeout_s,
        )

    def _model_card(self) -> ModelCard:
        return ModelCard(id=self.model.name, created=self.model.created, max_model_len=self.model.max_model_len)


def _wants_usage(body: GenerationFields) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)
