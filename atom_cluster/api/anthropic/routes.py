"""POST /v1/messages and /v1/messages/count_tokens: a conversation in, the next turn or its prompt's length out."""

from __future__ import annotations

import uuid

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from atom_cluster.api.answers.answering import answer_chat, tokenized_chat
from atom_cluster.api.anthropic.conversion import FIELD_NAMES, chat_request
from atom_cluster.api.anthropic.format import MessagesFormat
from atom_cluster.api.anthropic.requests import MessagesRequest, PromptFields
from atom_cluster.api.anthropic.wire import TokenCount
from atom_cluster.api.context import ApiContext
from atom_cluster.api.http.error_responses import json_response
from atom_cluster.api.http.field_names import fields_named
from atom_cluster.api.http.request_id import request_id
from atom_cluster.api.http.request_terms import RequestTerms
from atom_cluster.api.openapi.generation import COUNT_TOKENS, MESSAGES
from atom_cluster.api.openapi.operation import described


def add_message_routes(app: FastAPI, context: ApiContext) -> None:
    """Both routes."""

    async def messages(request: Request) -> Response:
        terms = RequestTerms.of(request)
        body = await context.read(MessagesRequest, request)
        answer_id = f"msg_{uuid.uuid4().hex}"
        words = MessagesFormat(
            answer_id=answer_id,
            model=context.model.name,
            request_id=request_id(request.scope),
            sends_thinking=body.thinking is None or body.thinking.display != "omitted",
        )
        terms = terms.with_priority(body.priority)
        chat = chat_request(body)
        with fields_named(FIELD_NAMES):
            return await answer_chat(context, chat, terms, answer_id=answer_id, words=words)

    async def count_tokens(request: Request) -> Response:
        body = await context.read(PromptFields, request)
        chat = chat_request(body)
        with fields_named(FIELD_NAMES):
            prompt = await tokenized_chat(context, chat)
        return json_response(TokenCount(input_tokens=len(prompt.token_ids)))

    app.post("/v1/messages", **described(MESSAGES))(messages)
    app.post("/v1/messages/count_tokens", **described(COUNT_TOKENS))(count_tokens)
