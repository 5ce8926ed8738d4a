"""POST /v1/responses: a conversation in, the items of the assistant's next turn out, as OpenAI words both."""

from __future__ import annotations

import time
import uuid

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from atom_cluster.api.answers.answering import answer_chat
from atom_cluster.api.context import ApiContext
from atom_cluster.api.http.field_names import fields_named
from atom_cluster.api.http.request_terms import RequestTerms
from atom_cluster.api.openai.requests import ChatCompletionRequest
from atom_cluster.api.openai.sampling import sampling_params
from atom_cluster.api.openapi.generation import RESPONSES
from atom_cluster.api.openapi.operation import described
from atom_cluster.api.responses.conversion import FIELD_NAMES, chat_request
from atom_cluster.api.responses.format import ResponsesFormat
from atom_cluster.api.responses.requests import ResponsesRequest
from atom_cluster.api.responses.wire import ResponseObject
from atom_cluster.errors import InvalidRequest


def add_response_routes(app: FastAPI, context: ApiContext) -> None:
    """The route."""

    async def responses(request: Request) -> Response:
        terms = RequestTerms.of(request)
        body = await context.read(ResponsesRequest, request)
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("`stream_options` needs `stream` to be true", param="stream_options")
        chat = chat_request(body)
        answer_id = f"resp_{uuid.uuid4().hex}"
        response = _response(context, body, chat, answer_id)
        words = ResponsesFormat(response, context.tokenizer.tokenizer, has_logprobs=bool(chat.logprobs))
        terms = terms.with_priority(body.priority)
        with fields_named(FIELD_NAMES):
            return await answer_chat(context, chat, terms, answer_id=answer_id, words=words)

    app.post("/v1/responses", **described(RESPONSES))(responses)


def _response(
    context: ApiContext, body: ResponsesRequest, chat: ChatCompletionRequest, answer_id: str
) -> ResponseObject:
    """What is known of a response before there is any output."""
    sampling = sampling_params(chat, model=context.model)
    choice = body.tool_choice
    return ResponseObject(
        id=answer_id,
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=context.model.name,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning={"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        temperature=sampling.temperature,
        text={"format": _format(body)},
        tool_choice=choice.model_dump() if choice is not None and not isinstance(choice, str) else choice or "auto",
        tools=[tool.model_dump() for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=sampling.top_p,
        usage=None,
        metadata=body.metadata or {},
    )


def _format(body: ResponsesRequest) -> dict[str, object]:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(by_alias=True, exclude_none=True)
