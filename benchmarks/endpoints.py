"""How each endpoint is asked, and what the events of its streams mean. Knows no connections and no clocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from benchmarks.datasets.request import LoadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What all requests of a run have in common."""

    model: str
    ignore_eos: bool = False
    logprobs: int | None = None
    temperature: float | None = 0.0
    """None: what the server takes by itself."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of every body."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of a stream, as far as measuring needs it."""

    has_output: bool = False
    """It carries text, reasoning, arguments of a tool call, or log probabilities."""
    is_finish: bool = False
    """It says why an output ended."""
    is_last: bool = False
    """What the stream has to end with."""
    text: str = ""
    usage: tuple[int, int, int] | None = None
    """Prompt, output and cached prompt tokens."""
    error: str | None = None


class Endpoint(Protocol):
    """One way to ask for an answer."""

    path: str

    def body(self, request: LoadRequest, asking: Asking) -> bytes:
        """What to POST. Raises ValueError for a prompt that this endpoint cannot take."""
        ...

    def piece(self, data: bytes) -> Piece:
        """What stands behind `data: ` of one event. Raises msgspec.DecodeError."""
        ...


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None

    def counts(self) -> tuple[int, int, int]:
        details = self.prompt_tokens_details
        return self.prompt_tokens, self.completion_tokens, 0 if details is None else details.cached_tokens


class _Error(msgspec.Struct):
    message: str = ""


class _TextChoice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None
    logprobs: msgspec.Raw = msgspec.Raw()


class _TextEvent(msgspec.Struct):
    choices: list[_TextChoice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw()


class _ChatChoice(msgspec.Struct):
    delta: _Delta = _Delta()
    finish_reason: str | None = None
    logprobs: msgspec.Raw = msgspec.Raw()


class _ChatEvent(msgspec.Struct):
    choices: list[_ChatChoice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_text_decoder = msgspec.json.Decoder(_TextEvent)
_chat_decoder = msgspec.json.Decoder(_ChatEvent)
_DONE = Piece(is_last=True)
_NOTHING = (b"", b"null", b"[]")


def _has(raw: msgspec.Raw) -> bool:
    return bytes(raw) not in _NOTHING


def _common(request: LoadRequest, asking: Asking) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": asking.model,
        "max_tokens": request.output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if asking.temperature is not None:
        body["temperature"] = asking.temperature
    if asking.ignore_eos:
        body["ignore_eos"] = True
    return body


class CompletionsEndpoint:
    """/v1/completions: text or token ids."""

    path = "/v1/completions"

    def body(self, request: LoadRequest, asking: Asking) -> bytes:
        """See `Endpoint`."""
        if request.messages is not None:
            raise ValueError("the dataset has conversations: ask with --backend openai-chat")
        body = {**_common(request, asking), "prompt": request.prompt}
        if asking.logprobs is not None:
            body["logprobs"] = asking.logprobs
        return msgspec.json.encode({**body, **asking.extra})

    def piece(self, data: bytes) -> Piece:
        """See `Endpoint`."""
        if data == b"[DONE]":
            return _DONE
        event = _text_decoder.decode(data)
        return Piece(
            has_output=any(choice.text or _has(choice.logprobs) for choice in event.choices),
            is_finish=any(choice.finish_reason for choice in event.choices),
            text="".join(choice.text for choice in event.choices),
            usage=None if event.usage is None else event.usage.counts(),
            error=None if event.error is None else event.error.message,
        )


class ChatEndpoint:
    """/v1/chat/completions: a text becomes a message of the user."""

    path = "/v1/chat/completions"

    def body(self, request: LoadRequest, asking: Asking) -> bytes:
        """See `Endpoint`."""
        body = {**_common(request, asking), "messages": _messages(request)}
        if asking.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": asking.logprobs}
        return msgspec.json.encode({**body, **asking.extra})

    def piece(self, data: bytes) -> Piece:
        """See `Endpoint`. The event that only names the role is no output."""
        if data == b"[DONE]":
            return _DONE
        event = _chat_decoder.decode(data)
        texts = [choice.delta.content or "" for choice in event.choices]
        return Piece(
            has_output=any(_chat_output(choice) for choice in event.choices),
            is_finish=any(choice.finish_reason for choice in event.choices),
            text="".join(texts),
            usage=None if event.usage is None else event.usage.counts(),
            error=None if event.error is None else event.error.message,
        )


def _chat_output(choice: _ChatChoice) -> bool:
    delta = choice.delta
    said = delta.content or delta.reasoning_content or delta.reasoning
    return bool(said) or _has(delta.tool_calls) or _has(choice.logprobs)


def _messages(request: LoadRequest) -> list[dict[str, str]]:
    if request.messages is not None:
        return [dict(message) for message in request.messages]
    if not isinstance(request.prompt, str):
        raise ValueError("this endpoint takes text, and the prompts are token ids: name a --tokenizer")
    return [{"role": "user", "content": request.prompt}]


class _ResponsesDetails(msgspec.Struct):
    cached_tokens: int = 0


class _ResponsesUsage(msgspec.Struct):
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _ResponsesDetails | None = None


class _Answer(msgspec.Struct):
    usage: _ResponsesUsage | None = None
    error: _Error | None = None


class _ResponsesEvent(msgspec.Struct):
    type: str = ""
    delta: str | None = None
    response: _Answer | None = None
    message: str | None = None


_responses_decoder = msgspec.json.Decoder(_ResponsesEvent)


class ResponsesEndpoint:
    """/v1/responses: typed events, of which the last has the counts."""

    path = "/v1/responses"

    def body(self, request: LoadRequest, asking: Asking) -> bytes:
        """See `Endpoint`."""
        if asking.logprobs is not None:
            raise ValueError("--logprobs is not sent to /v1/responses")
        body = _common(request, asking)
        del body["stream_options"]
        body["max_output_tokens"] = body.pop("max_tokens")
        return msgspec.json.encode({**body, "input": _messages(request), **asking.extra})

    def piece(self, data: bytes) -> Piece:
        """See `Endpoint`."""
        if data == b"[DONE]":
            return Piece()
        event = _responses_decoder.decode(data)
        if event.type == "error":
            return Piece(error=event.message or "error", is_last=True)
        if event.type.endswith(".delta"):
            text = event.delta or ""
            return Piece(has_output=bool(text), text=text if event.type == "response.output_text.delta" else "")
        if event.type not in ("response.completed", "response.incomplete", "response.failed"):
            return Piece()
        return self._end(event)

    def _end(self, event: _ResponsesEvent) -> Piece:
        answer = event.response or _Answer()
        usage, error = answer.usage, answer.error
        if event.type == "response.failed" and error is None:
            error = _Error("response.failed")
        details = None if usage is None else usage.input_tokens_details
        cached = 0 if details is None else details.cached_tokens
        return Piece(
            is_finish=True,
            is_last=True,
            usage=None if usage is None else (usage.input_tokens, usage.output_tokens, cached),
            error=None if error is None else error.message,
        )
