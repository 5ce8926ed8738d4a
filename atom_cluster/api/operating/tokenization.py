"""POST /tokenize and /detokenize: what the model's tokenizer makes of a text or a conversation, and of token ids.

Fields and paths are those of vLLM's server. Prompts may be as long as the model's context, as everywhere.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from atom_cluster.api.answers.answering import tokenized_chat
from atom_cluster.api.context import ApiContext
from atom_cluster.api.http.error_responses import json_response
from atom_cluster.api.http.request_body import validate
from atom_cluster.api.openai.requests import ChatCompletionRequest
from atom_cluster.api.openapi.operating import DETOKENIZE, TOKENIZE
from atom_cluster.api.openapi.operation import described
from atom_cluster.api.operating.tokenization_types import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import ContextLengthExceeded, InvalidRequest


def add_tokenization_routes(app: FastAPI, context: ApiContext) -> None:
    """Both routes."""
    tokenizer, model = context.tokenizer, context.model

    async def tokenize(request: Request) -> Response:
        body = await context.read(TokenizeRequest, request)
        if body.model is not None:
            context.check_model(body.model)
        token_ids = await _token_ids(context, body)
        texts = await tokenizer.run(lambda: _texts(tokenizer.tokenizer, token_ids)) if body.return_token_strs else None
        return json_response(
            TokenizeAnswer(count=len(token_ids), max_model_len=model.max_model_len, tokens=token_ids, token_strs=texts)
        )

    async def detokenize(request: Request) -> Response:
        body = await context.read(DetokenizeRequest, request)
        if body.model is not None:
            context.check_model(body.model)
        _check_length(len(body.tokens), context, "tokens")
        if body.tokens and not (min(body.tokens) >= 0 and max(body.tokens) < model.vocab_size):
            raise InvalidRequest(f"token ids are from 0 to {model.vocab_size - 1}", param="tokens")
        text = await tokenizer.run(lambda: tokenizer.tokenizer.decode(body.tokens, skip_special_tokens=False))
        return json_response(DetokenizeAnswer(prompt=text))

    app.post("/tokenize", **described(TOKENIZE))(tokenize)
    app.post("/detokenize", **described(DETOKENIZE))(detokenize)


def _texts(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    return [tokenizer.token_text(token_id) for token_id in token_ids]


async def _token_ids(context: ApiContext, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("either `prompt` or `messages` is needed, and not both", param="prompt")
    if body.prompt is None:
        return await _tokenize_chat(context, body)
    for name in ("tools", "chat_template_kwargs"):
        if getattr(body, name) is not None:
            raise InvalidRequest(f"`{name}` goes with `messages`", param=name)
    return await _tokenize_text(context, body.prompt, adds_special_tokens=body.add_special_tokens is not False)


async def _tokenize_chat(context: ApiContext, body: TokenizeRequest) -> list[int]:
    if body.add_special_tokens:
        raise InvalidRequest("the chat template writes special tokens", param="add_special_tokens")
    fields = body.model_dump(include={"messages", "tools", "chat_template_kwargs"}, exclude_unset=True)
    chat = validate(ChatCompletionRequest, {"model": context.model.name, **fields})
    token_ids = list((await tokenized_chat(context, chat)).token_ids)
    _check_length(len(token_ids), context, "messages")
    return token_ids


async def _tokenize_text(context: ApiContext, text: str, *, adds_special_tokens: bool) -> list[int]:
    tokenizer, limit = context.tokenizer.tokenizer, context.model.max_model_len

    def encode() -> list[int]:
        # A text that is far too long is not tokenized to its end.
        if tokenizer.surely_exceeds(text, limit):
            raise _too_long(context, "prompt")
        return tokenizer.encode(text, add_special_tokens=adds_special_tokens)

    token_ids = await context.tokenizer.run(encode)
    _check_length(len(token_ids), context, "prompt")
    return token_ids


def _check_length(num_tokens: int, context: ApiContext, param: str) -> None:
    if num_tokens > context.model.max_model_len:
        raise _too_long(context, param)


def _too_long(context: ApiContext, param: str) -> ContextLengthExceeded:
    limit = context.model.max_model_len
    return ContextLengthExceeded(f"the model's context holds {limit} tokens; `{param}` has more", param=param)
