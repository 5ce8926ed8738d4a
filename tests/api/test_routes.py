"""The HTTP API in memory: answers, streams, errors, and every kind of bad input."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, MutableMapping
from typing import Any

import httpx
import pytest

from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import Overloaded, RequestTimeout
from atom_cluster.observability.metrics import HTTP_ERRORS, HTTP_REQUESTS, HTTP_REQUESTS_OPEN, HTTP_TTFT_S
from tests.api.conftest import MODEL, Api
from tests.api.tiny_tokenizers import EOS_ID, VOCAB_SIZE

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}
MakeApi = Callable[..., Api]


def tool(name: str, **fields: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, **fields}}


def call(name: str, arguments: str) -> dict[str, object]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


def nested(depth: int) -> dict[str, object]:
    return {"properties": {"a": nested(depth - 2)}} if depth > 0 else {}


def events(response: httpx.Response) -> list[dict]:
    """Payloads of a stream that ended well."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.fixture
def hello(make_api: MakeApi, tokenizer: Tokenizer) -> Api:
    """An API that answers "Hello €" in three pieces, one of them in the middle of a character."""
    ids = tuple(tokenizer.encode("Hello €"))
    return make_api(lambda request: [ids[:3], ids[3:-1], ids[-1:], "stop"])


async def test_chat_answers_with_text_and_usage(hello: Api) -> None:
    hello.generator.num_cached_tokens = 3
    async with hello.client() as client:
        answer = (await client.post("/v1/chat/completions", json=CHAT)).json()
    assert answer["object"] == "chat.completion"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hello €"}
    assert choice["finish_reason"] == "stop"
    prompt = hello.generator.requests[0].token_ids
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 9)
    assert usage["total_tokens"] == len(prompt) + 9
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert 0 < usage["ttft_s"] <= usage["latency_s"]


async def test_chat_stream_gives_the_same_text_in_pieces(hello: Api) -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    async with hello.client() as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello €"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["finish_reason"]] == [
        "stop"
    ]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 9


async def test_completions_of_several_prompts_and_outputs_keep_their_places(make_api: MakeApi) -> None:
    api = make_api(lambda request: [request.token_ids, "length"])
    async with api.client() as client:
        answer = (await client.post("/v1/completions", json={**TEXT, "prompt": ["ab", "c"], "n": 2})).json()
        stream = await client.post("/v1/completions", json={**TEXT, "prompt": ["ab", "c"], "n": 2, "stream": True})
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "ab"),
        (1, "ab"),
        (2, "c"),
        (3, "c"),
    ]
    assert answer["usage"]["prompt_tokens"] == 3 and answer["usage"]["completion_tokens"] == 6
    texts = dict.fromkeys(range(4), "")
    for chunk in events(stream):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == ["ab", "ab", "c", "c"]
    assert len({request.request_id for request in api.generator.requests}) == 8


async def test_a_stop_string_ends_the_answer_and_the_generation(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    never = asyncio.Event()
    api = make_api(lambda request: [*[(token_id,) for token_id in tokenizer.encode("one. two. three")], never])
    async with api.client() as client:
        for stream in (False, True):
            body = {**TEXT, "stop": [" th", "zz"], "stream": stream}
            response = await client.post("/v1/completions", json=body)
            chunks = events(response) if stream else [response.json()]
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one. two."
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
            assert not api.generator.open_ids


async def test_end_tokens_are_counted_and_not_shown(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api(lambda request: [(*tokenizer.encode("ok"), EOS_ID), "stop"])
    async with api.client() as client:
        answer = (await client.post("/v1/completions", json=TEXT)).json()
    assert answer["choices"][0]["text"] == "ok"
    assert answer["usage"]["completion_tokens"] == 3


async def test_exactly_the_context_is_served_and_one_more_refused(hello: Api) -> None:
    async with hello.client() as client:
        for max_tokens, status in ((412, 200), (413, 400)):
            body = {"model": MODEL, "prompt": [1] * 100, "max_tokens": max_tokens}
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == status
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert hello.generator.requests[0].sampling.max_tokens == 412


async def test_refusal_before_the_first_token_is_a_status_even_when_streaming(make_api: MakeApi) -> None:
    api = make_api(lambda request: [Overloaded("queue full", retry_after_s=3)])
    async with api.client() as client:
        for stream in (False, True):
            response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
            assert response.status_code == 503
            assert response.headers["Retry-After"] == "3"
            assert response.json()["error"]["code"] == "queue_full"


async def test_error_after_the_first_token_is_an_event_and_no_done(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    api = make_api(lambda request: [tuple(tokenizer.encode("a")), gate, RequestTimeout("too late")])
    asyncio.get_running_loop().call_later(0.02, gate.set)
    async with api.client() as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == 200
    lines = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]
    assert lines[1]["choices"][0]["delta"] == {"content": "a"}
    assert lines[-1]["error"]["code"] == "request_timeout"


async def test_a_bug_is_a_500_without_its_text(make_api: MakeApi) -> None:
    api = make_api(lambda request: [KeyError("internals")])
    transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        response = await client.post("/v1/completions", json=TEXT)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error" and "internals" not in response.text


async def test_operators_routes(hello: Api) -> None:
    async with hello.client() as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/ready")).status_code == 200
        hello.generator.is_ready = False
        not_ready = await client.get("/ready")
        assert (not_ready.status_code, not_ready.headers["Retry-After"]) == (503, "3")
        assert (await client.get("/health")).status_code == 200
        assert "atom_requests_running 0" in (await client.get("/metrics")).text
        cluster = (await client.get("/v1/cluster")).json()
        assert cluster["replicas"] == [{"role": "decode"}]
        assert cluster["recent_errors"] == [], "a probe was told no, as it asked"
        assert cluster["api"]["tool_parser"] == "none: the chat template knows no tools"
        models = (await client.get("/v1/models")).json()
        assert [card["id"] for card in models["data"]] == [MODEL]
        assert (await client.get(f"/v1/models/{MODEL}")).json() == models["data"][0]
        assert (await client.get("/v1/models/a/b")).json()["error"]["code"] == "model_not_found"


async def test_unknown_paths_and_methods_answer_in_the_same_form(hello: Api) -> None:
    async with hello.client() as client:
        missing = await client.get("/v2/none")
        wrong = await client.get("/v1/completions")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["Allow"] == "POST"


async def test_requests_are_counted_by_route_and_status(hello: Api) -> None:
    async with hello.client() as client:
        await client.post("/v1/completions", json=TEXT)
        await client.post("/v1/completions", content=b"", headers={"content-type": "application/json"})
        await client.get("/v1/models/x")
        await client.get("/made/up")
    counted = hello.metrics
    assert counted.value(HTTP_REQUESTS, route="/v1/completions", status="200") == 1
    assert counted.value(HTTP_REQUESTS, route="/v1/completions", status="400") == 1
    assert counted.value(HTTP_REQUESTS, route="/v1/models/{model_id:path}", status="404") == 1
    assert counted.value(HTTP_REQUESTS, route="unknown", status="404") == 1
    assert counted.value(HTTP_REQUESTS_OPEN) == 0
    assert counted.histogram(HTTP_TTFT_S).count == 1


async def test_a_bug_is_counted_as_one_and_not_as_a_client_that_left(make_api: MakeApi) -> None:
    api = make_api(lambda request: [ValueError("a bug")])
    async with api.client(raises=False) as client:
        assert (await client.post("/v1/completions", json=TEXT)).status_code == 500
    assert api.metrics.value(HTTP_REQUESTS, route="/v1/completions", status="500") == 1
    assert api.metrics.value(HTTP_REQUESTS) == 1
    assert api.metrics.value(HTTP_ERRORS, kind="internal") == 1


async def test_a_client_that_leaves_before_the_last_empty_write_is_no_error(make_api: MakeApi) -> None:
    api = make_api(lambda request: [(72,), "stop"])
    has_left = asyncio.Event()
    body = [{"type": "http.request", "body": json.dumps({**TEXT, "stream": True}).encode(), "more_body": False}]
    sent = b""

    async def receive() -> dict[str, object]:
        if body:
            return body.pop()
        await has_left.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal sent
        sent += message.get("body", b"")
        if sent.endswith(b"data: [DONE]\n\n"):
            has_left.set()
            for _ in range(5):
                await asyncio.sleep(0)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await api.app(scope, receive, send)
    assert has_left.is_set()
    assert api.metrics.value(HTTP_ERRORS) == 0
    assert api.app.state.errors.recent.notes() == ()


BAD_CHAT = {
    "messages_empty": ({"messages": []}, "messages"),
    "messages_missing": ({"messages": None}, "messages"),
    "message_not_an_object": ({"messages": ["hi"]}, "messages[0]"),
    "unknown_role": ({"messages": [{"role": "cat", "content": "a"}]}, "messages[0].role"),
    "content_null": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    "content_number": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]},
        "messages[0].content",
    ),
    "unknown_model": ({"model": "gpt"}, "model"),
    "model_missing": ({"model": None}, "model"),
    "max_tokens_zero": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens_negative": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens_float": ({"max_tokens": 5.0}, "max_tokens"),
    "max_tokens_string": ({"max_tokens": "5"}, "max_tokens"),
    "max_tokens_true": ({"max_tokens": True}, "max_tokens"),
    "max_tokens_2_63": ({"max_tokens": 2**63}, "max_tokens"),
    "max_tokens_over_context": ({"max_tokens": 2**40}, "messages"),
    "prompt_too_long": ({"messages": [{"role": "user", "content": "a" * 600}]}, "messages"),
    "prompt_of_a_million_tokens": ({"messages": [{"role": "user", "content": "a " * 500_000}]}, "messages"),
    "n_huge": ({"n": 10**6}, "n"),
    "n_zero": ({"n": 0}, "n"),
    "top_logprobs_out_of_range": ({"logprobs": True, "top_logprobs": 100}, "top_logprobs"),
    "logprobs_number": ({"logprobs": 2}, "logprobs"),
    "temperature_negative": ({"temperature": -1}, "temperature"),
    "temperature_string": ({"temperature": "hot"}, "temperature"),
    "top_p_two": ({"top_p": 2}, "top_p"),
    "top_p_zero": ({"top_p": 0}, "top_p"),
    "top_k_below_minus_one": ({"top_k": -2}, "top_k"),
    "stop_with_empty_string": ({"stop": ["a", ""]}, "stop"),
    "stop_number": ({"stop": 3}, "stop"),
    "ten_thousand_stops": ({"stop": ["a"] * 10_000}, "stop"),
    "megabyte_stop": ({"stop": "a" * 1_000_000}, "stop"),
    "logit_bias": ({"logit_bias": {"999999": 1}}, "logit_bias"),
    "response_format": ({"response_format": {"type": "yaml"}}, "response_format.type"),
    "tools_that_the_template_does_not_know": ({"tools": [tool("f")]}, "tools"),
    "thousand_tools": ({"tools": [tool(f"f{number}") for number in range(1000)]}, "tools"),
    "tool_without_function": ({"tools": [{"type": "function"}]}, "tools[0].function"),
    "tool_that_the_server_would_run": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "tool_name_with_space": ({"tools": [tool("a b")]}, "tools[0].function.name"),
    "tool_named_twice": ({"tools": [tool("f"), tool("f")]}, "tools[1].function.name"),
    "tools_of_a_megabyte": ({"tools": [tool("f", description="a" * 2**20)]}, "tools"),
    "tool_parameters_deep": ({"tools": [tool("f", parameters=nested(40))]}, "tools[0].function.parameters"),
    "tool_parameters_of_an_array": (
        {"tools": [tool("f", parameters={"type": "array"})]},
        "tools[0].function.parameters.type",
    ),
    "tool_choice": ({"tool_choice": {"type": "function"}}, "tool_choice"),
    "tool_choice_unknown": (
        {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
    ),
    "tool_choice_required_of_nothing": ({"tool_choice": "required"}, "tool_choice"),
    "tool_choice_misspelt": ({"tools": [tool("f")], "tool_choice": "must"}, "tool_choice"),
    "message_without_content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "tool_message_without_call": ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id"),
    "user_that_calls": (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [call("f", "{}")]}]},
        "messages[0].tool_calls",
    ),
    "unknown_field": ({"kv_transfer_params": {"host": "x"}}, "kv_transfer_params"),
    "stream_string": ({"stream": "yes"}, "stream"),
    "seed_2_64": ({"seed": 2**64}, "seed"),
    "reserved_template_variable": ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
}
BAD_TEXT = {
    "prompt_missing": ({"prompt": None}, "prompt"),
    "prompt_empty": ({"prompt": ""}, "prompt"),
    "prompt_empty_list": ({"prompt": []}, "prompt"),
    "prompt_mixed": ({"prompt": ["a", 1]}, "prompt"),
    "prompt_with_true": ({"prompt": [1, True]}, "prompt"),
    "prompt_with_empty_ids": ({"prompt": [[1], []]}, "prompt"),
    "token_beyond_vocabulary": ({"prompt": [VOCAB_SIZE]}, "prompt"),
    "negative_token": ({"prompt": [-1]}, "prompt"),
    "too_many_prompts": ({"prompt": ["a"] * 65}, "prompt"),
    "logprobs_negative": ({"logprobs": -1}, "logprobs"),
    "echo_no_bool": ({"echo": 1}, "echo"),
    "no_output": ({"max_tokens": 0}, "max_tokens"),
    "prompt_logprobs_negative": ({"prompt_logprobs": -1}, "prompt_logprobs"),
    "prompt_logprobs_many": ({"prompt_logprobs": 21}, "prompt_logprobs"),
    "prompt_logprobs_in_a_stream": ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    "too_many_prompt_scores": ({"prompt": [[5] * 100] * 64, "prompt_logprobs": 20}, "prompt"),
    "too_many_echoes": ({"prompt": [[5] * 100] * 64, "logprobs": 20, "echo": True}, "prompt"),
    "suffix": ({"suffix": "end"}, "suffix"),
    "best_of": ({"best_of": 3, "n": 1}, "best_of"),
}
BAD_BODIES = {
    "empty": b"",
    "truncated": b'{"model": "tiny", "messages": [',
    "trailing_garbage": json.dumps(CHAT).encode() + b"}",
    "array": b"[]",
    "deep": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep_objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "invalid_utf8": b'{"model": "\xff\xfe"}',
    "lone_surrogate": b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "duplicate_key": b'{"model": "tiny", "model": "tiny"}',
    "nan": b'{"model": "tiny", "messages": [], "temperature": NaN}',
    "infinity": b'{"model": "tiny", "messages": [], "temperature": Infinity}',
}
FIELDS = [("/v1/chat/completions", CHAT, name, *case) for name, case in BAD_CHAT.items()]
FIELDS += [("/v1/completions", TEXT, name, *case) for name, case in BAD_TEXT.items()]


async def assert_refused_and_then_served(api: Api, path: str, body: bytes, param: str | None) -> None:
    async with api.client() as client:
        response = await client.post(path, content=body, headers={"content-type": "application/json"})
        error = response.json()["error"]
        assert 400 <= response.status_code < 500
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert 0 < len(error["message"]) < 1000
        assert not api.generator.requests
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


@pytest.mark.parametrize(("path", "good", "name", "change", "param"), FIELDS, ids=[field[2] for field in FIELDS])
async def test_bad_fields_are_named_and_the_next_request_is_served(
    hello: Api, path: str, good: dict, name: str, change: dict, param: str
) -> None:
    body = {key: value for key, value in {**good, **change}.items() if value is not None}
    await assert_refused_and_then_served(hello, path, json.dumps(body).encode(), param)


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_bad_bodies_are_refused_and_the_next_request_is_served(hello: Api, name: str) -> None:
    await assert_refused_and_then_served(hello, "/v1/chat/completions", BAD_BODIES[name], None)


async def test_control_characters_are_served(hello: Api) -> None:
    async with hello.client() as client:
        response = await client.post("/v1/completions", json={**TEXT, "prompt": "a\x00\x07b"})
    assert response.status_code == 200


async def test_another_content_type_is_refused(hello: Api) -> None:
    async with hello.client() as client:
        response = await client.post("/v1/completions", data={"prompt": "hi"})
    assert response.json()["error"]["code"] == "unsupported_media_type"


async def test_a_body_over_the_limit_is_413_declared_or_not(make_api: MakeApi, tokenizer: Tokenizer) -> None:
    api = make_api(lambda request: [tuple(tokenizer.encode("a")), "stop"], max_body_bytes=1024)
    num_sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_sent
        while num_sent < 1_000_000:
            num_sent += 100
            yield b" " * 100

    headers = {"content-type": "application/json"}
    async with api.client() as client:
        declared = await client.post("/v1/completions", content=b" " * 1025, headers=headers)
        chunked = await client.post("/v1/completions", content=endless(), headers=headers)
        lying = await client.post("/v1/completions", content=b"", headers={**headers, "content-length": "9" * 30})
        served = await client.post("/v1/completions", json=TEXT)
    assert [declared.status_code, chunked.status_code, lying.status_code, served.status_code] == [413, 413, 413, 200]
    assert num_sent < 5000


async def test_a_body_that_never_ends_is_408(make_api: MakeApi) -> None:
    api = make_api(lambda request: [], body_timeout_s=0.05)
    never = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield b"{"
        await never.wait()

    async with api.client() as client:
        response = await client.post("/v1/completions", content=stalled(), headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (408, "body_timeout")
