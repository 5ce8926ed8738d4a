"""The API in a real server on loopback: the official client, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import httpx
import openai
import pytest

from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import Overloaded, RequestFailed
from atom_cluster.observability.metrics import HTTP_REQUESTS
from tests.api.conftest import MODEL, Api, Serve

MESSAGES = [{"role": "user", "content": "hi"}]
MakeApi = Callable[..., Api]


def client_for(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def hello(make_api: MakeApi, tokenizer: Tokenizer) -> Api:
    return make_api(lambda request: [*[(token_id,) for token_id in tokenizer.encode("Hello €")], "stop"])


async def test_official_client_reads_chat_answers_and_streams(hello: Api, serve: Serve) -> None:
    async with client_for(await serve(hello.app)) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, user="u", extra_body={"top_k": 5}
        )
        assert [choice.message.content for choice in answer.choices] == ["Hello €", "Hello €"]
        assert answer.usage is not None and answer.usage.completion_tokens == 18
        assert answer.choices[0].logprobs is not None and len(answer.choices[0].logprobs.content or []) == 9
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello €"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 9


async def test_official_client_reads_completions_and_streams(hello: Api, serve: Serve) -> None:
    async with client_for(await serve(hello.app)) as client:
        answer = await client.completions.create(model=MODEL, prompt=["a", "b"], logprobs=1)
        assert [choice.text for choice in answer.choices] == ["Hello €", "Hello €"]
        assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.tokens
        stream = await client.completions.create(model=MODEL, prompt=[1, 2], stream=True)
        chunks = [chunk async for chunk in stream]
        models = await client.models.list()
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello €"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert [model.id for model in models.data] == [MODEL]


async def test_official_client_raises_its_own_errors(make_api: MakeApi, serve: Serve) -> None:
    async with client_for(await serve(make_api(lambda request: [Overloaded("full")]).app)) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=MODEL, messages=[])
        assert bad.value.param == "messages"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("none")
        with pytest.raises(openai.InternalServerError) as full:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        assert full.value.code == "queue_full"


async def test_official_client_raises_an_error_in_the_middle_of_a_stream(
    make_api: MakeApi, serve: Serve, tokenizer: Tokenizer
) -> None:
    gate = asyncio.Event()
    api = make_api(lambda request: [tuple(tokenizer.encode("a")), gate, RequestFailed("replica lost")])
    async with client_for(await serve(api.app)) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="replica lost"):
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    gate.set()


@pytest.mark.parametrize("streams", [True, False])
async def test_a_client_that_leaves_ends_all_its_requests(
    make_api: MakeApi, serve: Serve, tokenizer: Tokenizer, streams: bool
) -> None:
    never, running = asyncio.Event(), asyncio.Event()
    letter = tuple(tokenizer.encode("a"))

    def script(request: object) -> list[object]:
        if len(api.generator.open_ids) == 3:
            running.set()
        return [letter, never]

    api = make_api(script)
    url = await serve(api.app)
    body = {"model": MODEL, "prompt": "hi", "n": 3, "stream": streams}

    async def ask() -> None:
        async with (
            httpx.AsyncClient(timeout=None) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            async for _ in response.aiter_bytes():
                pass

    asking = asyncio.create_task(ask())
    await asyncio.wait_for(running.wait(), 10)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await asyncio.wait_for(api.generator.all_closed.wait(), 10)
    assert not api.generator.open_ids
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{url}/health")).status_code == 200
    status = "200" if streams else "499"
    assert api.metrics.value(HTTP_REQUESTS, route="/v1/completions", status=status) == 1


async def test_a_client_that_leaves_while_sending_its_body_does_no_harm(hello: Api, serve: Serve) -> None:
    url = httpx.URL(await serve(hello.app))
    for head in (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(head)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "hi"})
    assert answer.status_code == 200


async def test_a_large_body_is_refused_and_the_next_request_served(make_api: MakeApi, serve: Serve) -> None:
    api = make_api(lambda request: [(1,), "stop"], max_body_bytes=1024)
    url = httpx.URL(await serve(api.app))
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: 600000000\r\n\r\n" + b" " * 65536
    )
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 413")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_too_large"
    async with httpx.AsyncClient() as client:
        served = await client.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "hi"})
    assert served.status_code == 200


@pytest.mark.parametrize("num_headers, num_bytes, is_served", [(95, 1, True), (101, 1, False), (1, 34_000, False)])
async def test_headers_beyond_the_limits_pass_the_server_and_are_refused_by_the_application(
    hello: Api, serve: Serve, num_headers: int, num_bytes: int, is_served: bool
) -> None:
    url = httpx.URL(await serve(hello.app))
    reader, writer = await asyncio.open_connection(url.host, url.port)
    lines = [f"x-{number}: {'y' * num_bytes}\r\n" for number in range(num_headers)]
    writer.write(f"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{''.join(lines)}\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200" if is_served else b"HTTP/1.1 431")
    assert is_served or json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"
