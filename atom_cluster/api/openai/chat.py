"""POST /v1/chat/completions: a conversation in, the assistant's next turn out, as OpenAI words both."""

from __future__ import annotations

import uuid

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from atom_cluster.api.answers.answering import answer_chat, answer_header
from atom_cluster.api.context import ApiContext
from atom_cluster.api.http.request_terms import RequestTerms
from atom_cluster.api.openai.format import ChatFormat
from atom_cluster.api.openai.requests import ChatCompletionRequest
from atom_cluster.api.openapi.generation import CHAT
from atom_cluster.api.openapi.operation import described


def add_chat_routes(app: FastAPI, context: ApiContext) -> None:
    """The route."""

    async def chat_completions(request: Request) -> Response:
        terms = RequestTerms.of(request)
        body = await context.read(ChatCompletionRequest, request)
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        words = ChatFormat(
            answer_header(context, body, answer_id),
            context.tokenizer.tokenizer,
            sends_reasoning=body.include_reasoning is not False,
        )
        return await answer_chat(context, body, terms.with_priority(body.priority), answer_id=answer_id, words=words)

    app.post("/v1/chat/completions", **described(CHAT))(chat_completions)
