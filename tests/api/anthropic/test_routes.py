"""/v1/messages over a scripted generator, by Anthropic's client where it can say what is meant."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import anthropic
import pytest

from atom_cluster.api.anthropic.errors import speaks_anthropic
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import Overloaded, RequestFailed
from tests.api.conftest import MODEL, Api, Serve

MakeApi = Callable[..., Api]
USER = {"role": "user", "content": "hi"}
BODY = {"model": MODEL, "max_tokens": 50, "messages": [USER]}


@pytest.fixture
def hello(make_api: MakeApi, tokenizer: Tokenizer) -> Api:
    return make_api(lambda request: [*[(token_id,) for token_id in tokenizer.encode("Hello €")], "stop"])


def client_for(url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0)


async def post(api: Api, path: str = "/v1/messages", **fields: object) -> tuple[int, dict]:
    async with api.client() as client:
        response = await client.post(path, json={**BODY, **fields})
    return response.status_code, response.json()


async def test_official_client_creates_a_message(hello: Api, serve: Serve) -> None:
    hello.generator.num_cached_tokens = 2
    async with client_for(await serve(hello.app)) as client:
        message = await client.messages.create(
            model=MODEL,
            max_tokens=50,
            system="be short",
            messages=[USER],
            extra_body={"temperature": 0.5, "top_k": 3},
        )
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == "Hello €"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    request = hello.generator.requests[0]
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (len(request.token_ids) - 2, 2)
    assert usage.output_tokens == 9
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.max_tokens) == (0.5, 3, 50)
    assert message._request_id and message._request_id.startswith("req-")


async def test_official_client_streams_a_message(hello: Api, serve: Serve) -> None:
    async with (
        client_for(await serve(hello.app)) as client,
        client.messages.stream(model=MODEL, max_tokens=50, messages=[USER]) as stream,
    ):
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == "Hello €" and final.content[0].text == "Hello €"
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 9)


async def test_a_stop_sequence_is_named(make_api: MakeApi, tokenizer: Tokenizer, serve: Serve) -> None:
    api = make_api(lambda request: [tuple(tokenizer.encode("one. two")), "stop"])
    async with client_for(await serve(api.app)) as client:
        arguments = {"model": MODEL, "max_tokens": 50, "messages": [USER], "stop_sequences": [" t"]}
        message = await client.messages.create(**arguments)
        async with client.messages.stream(**arguments) as stream:
            streamed = await stream.get_final_message()
    for answer in (message, streamed):
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " t")
        assert answer.content[0].text == "one."


async def test_official_client_counts_tokens(hello: Api, serve: Serve) -> None:
    async with client_for(await serve(hello.app)) as client:
        count = await client.messages.count_tokens(model=MODEL, messages=[USER], system="be short")
        message = await client.messages.create(model=MODEL, max_tokens=5, messages=[USER], system="be short")
    assert count.input_tokens == message.usage.input_tokens
    assert len(hello.generator.requests) == 1


async def test_official_client_raises_its_own_errors(make_api: MakeApi, serve: Serve) -> None:
    async with client_for(await serve(make_api(lambda request: [Overloaded("full")]).app)) as client:
        with pytest.raises(anthropic.BadRequestError) as bad:
            await client.messages.create(model=MODEL, max_tokens=0, messages=[USER])
        assert bad.value.body == {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "`max_tokens`: Input should be greater than or equal to 1",
            },
            "request_id": bad.value.request_id,
        }
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="other", max_tokens=5, messages=[USER])
        with pytest.raises(anthropic.InternalServerError) as full:
            await client.messages.create(model=MODEL, max_tokens=5, messages=[USER], stream=True)
        assert full.value.response.headers["retry-after"] == "1"
        assert full.value.body["error"]["type"] == "overloaded_error"


async def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_client(
    make_api: MakeApi, serve: Serve, tokenizer: Tokenizer
) -> None:
    gate = asyncio.Event()
    api = make_api(lambda request: [tuple(tokenizer.encode("a")), gate, RequestFailed("replica lost")])
    async with client_for(await serve(api.app)) as client:
        stream = await client.messages.create(model=MODEL, max_tokens=5, messages=[USER], stream=True)
        with pytest.raises(anthropic.APIStatusError, match="replica lost"):
            async for _ in stream:
                gate.set()


async def test_text_blocks_are_joined_and_the_system_comes_first(hello: Api, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": ""}, TEXT_C]},
        {"role": "user", "content": "d"},
    ]
    cached = {"type": "ephemeral"}
    system = [{"type": "text", "text": "s", "cache_control": cached}]
    assert (await post(hello, messages=messages, system=system))[0] == 200
    turns = [("system", "s"), ("user", "a\nb"), ("assistant", "c"), ("user", "d")]
    expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    assert tokenizer.decode(hello.generator.requests[0].token_ids, skip_special_tokens=False) == expected


TEXT_C = {"type": "text", "text": "c"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [USER, {"role": "assistant", "content": "so"}]}, "messages[1].role"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "i", "name": "f", "input": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"temperature": 1.5}, "temperature"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"url": "http://127.0.0.1"}]}, "mcp_servers"),
        ({"max_tokens": 10_000}, "messages"),
        ({"stop_sequences": ["x"] * 1000}, "stop_sequences"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(hello: Api, fields: dict, named: str) -> None:
    status, answer = await post(hello, **fields)
    assert (status, answer["type"], answer["error"]["type"]) == (400, "error", "invalid_request_error")
    assert named in answer["error"]["message"]
    assert not hello.generator.requests


async def test_unknown_methods_and_paths_below_have_the_form_too(hello: Api) -> None:
    async with hello.client() as client:
        for response, status in (
            (await client.get("/v1/messages"), 405),
            (await client.post("/v1/messages/batches", json={}), 404),
        ):
            assert (response.status_code, response.json()["type"]) == (status, "error")


def test_the_form_of_errors_is_known_below_a_prefix_too() -> None:
    assert speaks_anthropic({"path": "/llm/v1/messages", "root_path": "/llm"})
    assert not speaks_anthropic({"path": "/llm/v1/completions", "root_path": "/llm"})
