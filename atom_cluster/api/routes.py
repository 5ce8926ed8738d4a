"""Stop 3 of 14: an HTTP request is checked and answered. Next: api/text/chat_template.py and api/text/tokenizer.py.

`create_app` makes the whole HTTP API over a `Generator`; `serving/ingress.py` hosts it. Each group of routes has its
file; here is what there is. Knows nothing of Ray, engines or where tokens come from.
"""

from __future__ import annotations

from fastapi import FastAPI

from atom_cluster.api.answers.grammars import GrammarService
from atom_cluster.api.anthropic.routes import add_message_routes
from atom_cluster.api.context import ApiContext
from atom_cluster.api.generator import Generator
from atom_cluster.api.http.error_responses import install_error_handlers
from atom_cluster.api.http.request_counter import RequestCounter
from atom_cluster.api.http.request_id import RequestIds
from atom_cluster.api.http.request_record import Recorder, RequestRecords
from atom_cluster.api.openai.chat import add_chat_routes
from atom_cluster.api.openai.completions import add_completion_routes
from atom_cluster.api.openapi.routes import add_openapi_routes
from atom_cluster.api.operating.models import add_model_routes
from atom_cluster.api.operating.profiling import add_profile_routes
from atom_cluster.api.operating.state import add_state_routes
from atom_cluster.api.operating.timeline import add_timeline_routes
from atom_cluster.api.operating.tokenization import add_tokenization_routes
from atom_cluster.api.parsers.dialect import choose_dialect
from atom_cluster.api.protection.gate import Gate
from atom_cluster.api.protection.middleware import Protection
from atom_cluster.api.responses.routes import add_response_routes
from atom_cluster.api.status_page.page import add_status_page
from atom_cluster.api.text.model_files import ServedModel
from atom_cluster.api.text.tokenizer import TokenizerService
from atom_cluster.config.serving import ApiConfig
from atom_cluster.observability.metrics import MetricSink, NullMetrics
from atom_cluster.observability.timeline_store import TimelineStore


def create_app(
    *,
    generator: Generator,
    tokenizer: TokenizerService,
    model: ServedModel,
    limits: ApiConfig,
    metrics: MetricSink | None = None,
    gate: Gate | None = None,
    recorder: Recorder | None = None,
    grammars: GrammarService | None = None,
    proxy_sends_request_id: bool = False,
) -> FastAPI:
    """The HTTP API. The caller keeps ownership of `generator` and `tokenizer` and closes them after the app.

    `gate`: who may pass; None makes one from `limits.protection`. `recorder`: where what is noted of requests goes;
    None keeps nothing. `grammars`: closed by the caller; None: there is no structured output.
    `proxy_sends_request_id`: a proxy in front adds `X-Request-Id` to answers.
    """
    context = ApiContext(
        generator=generator,
        tokenizer=tokenizer,
        model=model,
        limits=limits,
        metrics=metrics or NullMetrics(),
        dialect=choose_dialect(
            tool_parser=limits.tool_parser,
            reasoning_parser=limits.reasoning_parser,
            template=tokenizer.chat_template,
            tokenizer=tokenizer.tokenizer,
        ),
        grammars=grammars or GrammarService(None, timeout_s=limits.grammar_timeout_s),
    )
    app = FastAPI(title="atom_cluster", docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app, context.metrics)
    add_chat_routes(app, context)
    add_completion_routes(app, context)
    add_response_routes(app, context)
    add_message_routes(app, context)
    add_tokenization_routes(app, context)
    add_model_routes(app, context)
    add_state_routes(app, context)
    add_profile_routes(app, context)
    add_status_page(app)
    add_openapi_routes(app, context)
    recorder = recorder or Recorder(ingress="", store=TimelineStore(0))
    add_timeline_routes(app, context, recorder.store)
    # The last one added is the first to see a request.
    gate = gate or Gate(limits.protection, metrics=context.metrics)
    app.add_middleware(Protection, gate=gate, routes=app.router.routes)
    app.add_middleware(RequestCounter, metrics=context.metrics)
    app.add_middleware(RequestRecords, recorder=recorder)
    app.add_middleware(RequestIds, proxy_answers=proxy_sends_request_id)
    return app
