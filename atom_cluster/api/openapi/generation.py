"""Operations of the routes that generate or count prompts, with examples. A test posts each and checks its answer."""

from __future__ import annotations

from typing import Any

from atom_cluster.api.anthropic import wire as anthropic_wire
from atom_cluster.api.anthropic.errors import MessagesError
from atom_cluster.api.anthropic.requests import MessagesRequest, PromptFields
from atom_cluster.api.openai.requests import ChatCompletionRequest, CompletionRequest
from atom_cluster.api.openai.wire import ChatCompletion, ChatCompletionChunk, Completion, ErrorBody
from atom_cluster.api.openapi.operation import BODY_ERRORS, GENERATION_ERRORS, SERVED_MODEL, Example, Operation
from atom_cluster.api.responses import wire as responses_wire
from atom_cluster.api.responses.requests import ResponsesRequest

_USAGE: dict[str, Any] = {
    "prompt_tokens": 14,
    "completion_tokens": 3,
    "total_tokens": 17,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
    "ttft_s": 0.021,
    "tpot_s": 0.004,
    "latency_s": 0.029,
}
_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def _chat_answer(content: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {
        "id": "chatcmpl-6f1c",
        "object": "chat.completion",
        "created": 1767225600,
        "model": SERVED_MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": _USAGE,
    }


CHAT = Operation(
    tag="Generation",
    summary="The assistant's next turn of a conversation",
    description="OpenAI's chat completions, with fields of vLLM's and ATOM's servers. The last event is `[DONE]`.",
    request=ChatCompletionRequest,
    answer=ChatCompletion,
    events=(ChatCompletionChunk, ErrorBody),
    errors=GENERATION_ERRORS,
    takes_terms=True,
    examples=(
        Example(
            summary="A question",
            request={"model": SERVED_MODEL, "messages": _QUESTION, "max_tokens": 16, "temperature": 0},
            answer=_chat_answer("It is Paris."),
        ),
        Example(
            summary="As a stream",
            request={
                "model": SERVED_MODEL,
                "messages": _QUESTION,
                "stream": True,
                "stream_options": {"include_usage": False},
            },
            answer='data: {"id":"chatcmpl-6f1c","object":"chat.completion.chunk","created":1767225600,"model":"'
            + SERVED_MODEL
            + '","choices":[{"index":0,"delta":{"content":"It is"},"logprobs":null,"finish_reason":null}]}\n\n'
            "data: [DONE]\n\n",
        ),
    ),
)
COMPLETIONS = Operation(
    tag="Generation",
    summary="Continuations of one or more prompts",
    description="OpenAI's older completions. Prompts are texts or token ids. The last event is `[DONE]`.",
    request=CompletionRequest,
    answer=Completion,
    events=(Completion, ErrorBody),
    errors=GENERATION_ERRORS,
    takes_terms=True,
    examples=(
        Example(
            summary="A text",
            request={"model": SERVED_MODEL, "prompt": "The capital of France is", "max_tokens": 3, "stop": ["."]},
            answer={
                "id": "cmpl-6f1c",
                "object": "text_completion",
                "created": 1767225600,
                "model": SERVED_MODEL,
                "choices": [{"index": 0, "text": " Paris", "logprobs": None, "finish_reason": "stop"}],
                "usage": _USAGE,
            },
        ),
        Example(
            summary="Token ids, twice",
            request={"model": SERVED_MODEL, "prompt": [[1, 2, 3]], "n": 2, "seed": 7, "logprobs": 0},
            answer={
                "id": "cmpl-6f1d",
                "object": "text_completion",
                "created": 1767225600,
                "model": SERVED_MODEL,
                "choices": [
                    {
                        "index": index,
                        "text": text,
                        "logprobs": {
                            "tokens": [text],
                            "token_logprobs": [-0.5],
                            "top_logprobs": [{text: -0.5}],
                            "text_offset": [0],
                        },
                        "finish_reason": "length",
                    }
                    for index, text in enumerate((" a", " the"))
                ],
                "usage": _USAGE,
            },
        ),
        Example(
            summary="How likely a text is",
            request={"model": SERVED_MODEL, "prompt": [[1, 2]], "echo": True, "logprobs": 0, "max_tokens": 0},
            answer={
                "id": "cmpl-6f1e",
                "object": "text_completion",
                "created": 1767225600,
                "model": SERVED_MODEL,
                "choices": [
                    {
                        "index": 0,
                        "text": "One two",
                        "logprobs": {
                            "tokens": ["One", " two"],
                            "token_logprobs": [None, -2.5],
                            "top_logprobs": [None, {" two": -2.5}],
                            "text_offset": [0, 3],
                        },
                        "finish_reason": "length",
                    }
                ],
                "usage": {**_USAGE, "prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2},
            },
        ),
    ),
)
_RESPONSE: dict[str, Any] = {
    "id": "resp_6f1c",
    "object": "response",
    "created_at": 1767225600,
    "status": "completed",
    "error": None,
    "incomplete_details": None,
    "instructions": "Answer in one word.",
    "max_output_tokens": None,
    "model": SERVED_MODEL,
    "output": [
        {
            "type": "message",
            "id": "msg_6f1c_0",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Paris", "annotations": [], "logprobs": []}],
        }
    ],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": False,
    "background": False,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "usage": {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 16},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 22,
    },
    "metadata": {},
}
RESPONSES = Operation(
    tag="Generation",
    summary="The items of the assistant's next turn",
    description="OpenAI's responses, without what needs a store or tools that the server runs.",
    request=ResponsesRequest,
    answer=responses_wire.ResponseObject,
    events=responses_wire.STREAM_EVENTS,
    errors=GENERATION_ERRORS,
    takes_terms=True,
    examples=(
        Example(
            summary="A text",
            request={
                "model": SERVED_MODEL,
                "input": "What is the capital of France?",
                "instructions": "Answer in one word.",
            },
            answer=_RESPONSE,
        ),
        Example(
            summary="A conversation as a stream",
            request={
                "model": SERVED_MODEL,
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
                    {"role": "assistant", "content": [{"type": "output_text", "text": "Hello!"}]},
                    {"role": "user", "content": "What is the capital of France?"},
                ],
                "stream": True,
            },
            answer='event: response.output_text.delta\ndata: {"type":"response.output_text.delta","sequence_number":4,'
            '"item_id":"msg_6f1c_0","output_index":0,"content_index":0,"delta":"Paris","logprobs":[]}\n\n',
        ),
    ),
)
MESSAGES = Operation(
    tag="Generation",
    summary="The assistant's next turn, as Anthropic's API words it",
    description="Anthropic's messages: text, tool calls and thinking. The header `anthropic-version` has no effect.",
    request=MessagesRequest,
    answer=anthropic_wire.MessageObject,
    events=(*anthropic_wire.STREAM_EVENTS, MessagesError),
    errors=GENERATION_ERRORS,
    takes_terms=True,
    examples=(
        Example(
            summary="A question",
            request={"model": SERVED_MODEL, "max_tokens": 16, "system": "Be short.", "messages": _QUESTION},
            answer={
                "id": "msg_6f1c",
                "type": "message",
                "role": "assistant",
                "model": SERVED_MODEL,
                "content": [{"type": "text", "text": "Paris."}],
                "stop_reason": "end_turn",
                "stop_sequence": None,
                "usage": {"input_tokens": 4, "cache_read_input_tokens": 16, "output_tokens": 3},
            },
        ),
        Example(
            summary="As a stream",
            request={"model": SERVED_MODEL, "max_tokens": 16, "messages": _QUESTION, "stream": True},
            answer='event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
            '"delta":{"type":"text_delta","text":"Paris."}}\n\n',
        ),
    ),
)
COUNT_TOKENS = Operation(
    tag="Tokenization",
    summary="How many tokens a conversation has, as Anthropic's API words it",
    request=PromptFields,
    answer=anthropic_wire.TokenCount,
    errors=BODY_ERRORS,
    examples=(
        Example(
            summary="A question",
            request={"model": SERVED_MODEL, "messages": _QUESTION},
            answer={"input_tokens": 14},
        ),
    ),
)
