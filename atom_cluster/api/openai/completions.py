"""POST /v1/completions: prompts in, their continuations out, as OpenAI words both."""

from __future__ import annotations

import uuid

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from atom_cluster.api.answers.answering import answer_header, answer_prompts, checked_grammar
from atom_cluster.api.answers.prompts import completion_prompts
from atom_cluster.api.context import ApiContext
from atom_cluster.api.http.request_terms import RequestTerms
from atom_cluster.api.openai.echoes import echoes_of
from atom_cluster.api.openai.format import CompletionFormat
from atom_cluster.api.openai.requests import CompletionRequest
from atom_cluster.api.openai.sampling import check_request
from atom_cluster.api.openai.structured_fields import wanted_grammar
from atom_cluster.api.openapi.generation import COMPLETIONS
from atom_cluster.api.openapi.operation import described


def add_completion_routes(app: FastAPI, context: ApiContext) -> None:
    """The route."""
    tokenizer, model = context.tokenizer, context.model

    async def completions(request: Request) -> Response:
        terms = RequestTerms.of(request)
        body = await context.read(CompletionRequest, request)
        check_request(body, model=model, limits=context.limits)
        prompts = await tokenizer.run(
            lambda: completion_prompts(body, tokenizer=tokenizer.tokenizer, max_tokens=model.max_model_len)
        )
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        echoes = await tokenizer.run(lambda: echoes_of(body, prompts, tokenizer.tokenizer)) if body.echo else None
        words = CompletionFormat(answer_header(context, body, answer_id), tokenizer.tokenizer, echoes=echoes)
        terms = terms.with_priority(body.priority)
        wanted = wanted_grammar(body, max_bytes=context.limits.max_grammar_bytes)
        grammar = await checked_grammar(context, body, wanted)
        return answer_prompts(context, body, prompts, terms, answer_id=answer_id, words=words, grammar=grammar)

    app.post("/v1/completions", **described(COMPLETIONS))(completions)
