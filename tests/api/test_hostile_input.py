"""Twenty-nine things that a client may send on purpose or by mistake, by number; docs/protection.md lists them.

Each is refused with a 4xx in OpenAI's form, or is harmless and served; afterwards nothing is open and the next request
is served. What depends on the connection is in tests/e2e/test_bad_input.py, over a real cluster.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import pytest

from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.tools.drill.listeners import resident_bytes
from tests.api.conftest import MODEL, Api, Serve
from tests.api.tiny_tokenizers import VOCAB_SIZE

MAX_MODEL_LEN = 512
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
REFUSED = range(400, 500)
ANY = (200, *REFUSED)
"""Harmless either way: what may be served depends on what the model supports."""


def chat(**fields: object) -> bytes:
    return json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | fields
    ).encode()


def text(**fields: object) -> bytes:
    return json.dumps({"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 2} | fields).encode()


def chat_with(content: object, role: str = "user") -> bytes:
    return chat(messages=[{"role": role, "content": content}])


def raw(**fields: str) -> bytes:
    """A chat whose fields are given as JSON text."""
    return chat()[:-1] + b"".join(f', "{name}": {value}'.encode() for name, value in fields.items()) + b"}"


@dataclass(frozen=True)
class Sent:
    """One request, and the statuses that are right for it."""

    body: bytes
    path: str = CHAT
    expected: object = REFUSED
    headers: dict[str, str] = field(default_factory=dict)


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def json_schema(schema: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


def tool(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


def image(url: str) -> bytes:
    return chat_with([{"type": "text", "text": "what is it"}, {"type": "image_url", "image_url": {"url": url}}])


IMAGES = (
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.1:8000/redirect",
    "http://localtest.me/",
    "file:///etc/passwd",
    "https://example.com/10gb",
    "data:image/png;base64,AAAA",
)
REGEXES = ("(a+)+$", "foo**", "^(|.*)$", ".{1,100000}", "(" * 5000, "[a-", "\\" * 99)

CASES: dict[int, list[Sent]] = {
    1: [Sent(b""), Sent(b"", TEXT), Sent(b"   ")],
    2: [Sent(chat()[:-5]), Sent(b'{"model": "tiny", "messages": ['), Sent(b"{")],
    3: [Sent(chat() + b"x"), Sent(chat() + chat())],
    4: [Sent(raw(metadata="[" * 10**5 + "]" * 10**5)), Sent(b"[" * 10**5), Sent(b'{"a":' * 10**5)],
    5: [Sent(raw(model='"tiny"')), Sent(raw(metadata='{"a": 1, "a": 2}'))],
    6: [Sent(chat_with("QQ").replace(b"QQ", b"\xff\xfe")), Sent(text(prompt="QQ").replace(b"QQ", b"\xc3"), TEXT)],
    7: [Sent(chat_with("QQ").replace(b"QQ", b"\\ud800")), Sent(raw(**{"\\udc00": "1"}))],
    8: [Sent(chat_with("a\x00\x07\x1b[2Jb"), expected=(200,)), Sent(chat_with("QQ").replace(b"QQ", b"a\x00b"))],
    9: [
        Sent(chat(), headers={"content-type": kind}) for kind in ("text/plain", "application/x-www-form-urlencoded", "")
    ],
    10: [
        Sent(chat(messages=[])),
        Sent(chat(messages=None)),
        Sent(chat_with(None)),
        Sent(chat_with("x", role="wizard")),
        Sent(chat(messages=[{"role": "assistant", "content": "x"}] * 2), expected=ANY),
        Sent(chat(messages=[{"role": "tool", "content": "x"}])),
    ],
    11: [
        Sent(chat(model="gpt-none")),
        Sent(chat(model=7)),
        Sent(chat(model="m" * 10**6)),
        Sent(text(model="../x"), TEXT),
    ],
    12: [Sent(raw(max_tokens=value)) for value in ("0", "-1", str(2**63), "2.0", '"2"', "1e400", "true", "9" * 5000)],
    13: [
        Sent(text(prompt=[1] * (MAX_MODEL_LEN - 2)), TEXT, expected=(200,)),
        Sent(text(prompt=[1] * (MAX_MODEL_LEN - 1)), TEXT),
        Sent(text(prompt=[1] * MAX_MODEL_LEN, max_tokens=None), TEXT),
    ],
    14: [Sent(text(prompt=[1] * 10**6), TEXT), Sent(text(prompt=" a" * 10**6), TEXT), Sent(chat_with(" a" * 10**6))],
    15: [Sent(chat_with("x" * (9 << 20)))],
    16: [Sent(chat(n=10**6)), Sent(chat(n=0)), Sent(text(n=-1), TEXT)],
    17: [
        *(Sent(raw(temperature=value)) for value in ("NaN", "Infinity", "-Infinity", "-1", "1e999")),
        Sent(chat(top_p=2)),
        Sent(chat(top_p=0)),
    ],
    18: [Sent(chat(logit_bias=bias)) for bias in ({str(VOCAB_SIZE): 1}, {"-1": 1}, {"a": 1}, {"1": 1e9}, [1])],
    19: [Sent(chat(stop=["x"] * 10**4)), Sent(chat(stop="x" * 10**6)), Sent(chat(stop=[""]))],
    20: [
        Sent(chat(stream_options={"include_usage": True})),
        *(Sent(chat(stream=True, stream_options={"include_usage": usage}), expected=(200,)) for usage in (True, False)),
    ],
    21: [
        Sent(chat(logprobs=True, top_logprobs=10**6)),
        Sent(chat(top_logprobs=2)),
        Sent(text(logprobs=-1), TEXT),
        Sent(text(echo="yes"), TEXT),
        Sent(text(prompt_logprobs=10**6), TEXT),
    ],
    22: [
        Sent(chat(response_format={"type": "yaml"})),
        Sent(chat(response_format={"type": "json_schema"})),
        Sent(chat(response_format=json_schema({"type": "nothing"}))),
        Sent(
            chat(response_format=json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
            expected=ANY,
        ),
        Sent(chat(response_format=json_schema({"enum": [f"value {number}" for number in range(10**4)]})), expected=ANY),
        Sent(chat(response_format=json_schema(nested(60))), expected=ANY),
        Sent(chat(response_format=json_schema({"$ref": "http://169.254.169.254/schema"})), expected=ANY),
    ],
    23: [
        *(Sent(chat(guided_regex=regex), expected=ANY) for regex in REGEXES),
        *(Sent(chat(structured_outputs={"regex": regex}), expected=ANY) for regex in REGEXES[:2]),
        Sent(chat(guided_grammar="root: " + "(" * 1000), expected=ANY),
    ],
    24: [
        Sent(chat(tools=[tool(f"f{number}") for number in range(10**3)]), expected=ANY),
        Sent(chat(tools=[tool("f")], tool_choice={"type": "function", "function": {"name": "g"}})),
        Sent(chat(tool_choice={"type": "function", "function": {"name": "g"}})),
        Sent(chat(tools=[{"type": "function"}])),
    ],
    25: [Sent(image(url)) for url in IMAGES],
    26: [
        Sent(chat(kv_transfer_params={"remote_host": "10.0.0.1", "do_remote_prefill": True})),
        Sent(chat(prefill="replica-1")),
        Sent(
            chat(),
            expected=(200,),
            headers={"x-data-parallel-rank": "7", "x-prefiller-host-port": "10.0.0.1:1", "x-worker-id": "a"},
        ),
    ],
}


@pytest.fixture
def api(make_api: Callable[..., Api], tokenizer: Tokenizer) -> Api:
    return make_api(lambda request: [*[(token_id,) for token_id in tokenizer.encode("Hi")], "stop"])


async def check(client: httpx.AsyncClient, sent: Sent) -> httpx.Response:
    answer = await client.post(sent.path, content=sent.body, headers=JSON | sent.headers)
    assert answer.status_code in sent.expected, (answer.status_code, answer.text[:300])  # type: ignore[operator]
    if answer.status_code >= 400:
        (error,) = answer.json().values()
        assert error.keys() == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) < 1000 and error["type"] == "invalid_request_error"
    return answer


@pytest.mark.parametrize(
    ("number", "sent"),
    [(number, sent) for number, cases in CASES.items() for sent in cases],
    ids=lambda value: str(value)[:2],
)
async def test_it_is_refused_or_harmless_and_the_next_request_is_served(api: Api, number: int, sent: Sent) -> None:
    async with api.client() as client:
        await check(client, sent)
        assert not api.generator.open_ids
        assert (await client.post(CHAT, content=chat(), headers=JSON)).status_code == 200


async def test_25_nothing_is_fetched_on_a_clients_word(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"somebody looks for {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    loop = asyncio.get_running_loop()
    for name in ("create_connection", "getaddrinfo", "sock_connect"):
        monkeypatch.setattr(loop, name, refuse)
    remote = [sent for sent in CASES[22] if b"169.254" in sent.body]
    assert remote
    async with api.client() as client:
        for sent in (*CASES[25], *remote):
            answer = await check(client, sent)
            assert "somebody looks" not in answer.text


async def test_26_headers_choose_no_engine(api: Api) -> None:
    """What reaches the cluster is the same with and without them."""
    async with api.client() as client:
        for sent in (Sent(chat(seed=1)), Sent(chat(seed=1), headers=CASES[26][-1].headers)):
            await client.post(CHAT, content=sent.body, headers=JSON | sent.headers)
    first, second = api.generator.requests
    assert (first.token_ids, first.sampling) == (second.token_ids, second.sampling)


async def test_27_one_request_id_at_the_same_time_again_and_again(api: Api) -> None:
    headers = JSON | {"x-request-id": "the same"} | {"idempotency-key": "the same"}
    async with api.client() as client:
        answers = await asyncio.gather(*(client.post(CHAT, content=chat(), headers=headers) for _ in range(20)))
    assert [answer.status_code for answer in answers] == [200] * 20
    assert len({answer.json()["id"] for answer in answers}) == 20
    assert len({request.request_id for request in api.generator.requests}) == 20


async def test_28_slow_senders_are_told_and_slow_readers_are_cut_off(
    make_api: Callable[..., Api], serve: Serve
) -> None:
    endless = make_api(lambda request: ((1,) * 500 for _ in range(10**9)), body_timeout_s=0.2, write_timeout_s=0.2)
    host, _, port = (await serve(endless.app)).removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode())
    writer.write(b"Content-Length: 100\r\n\r\n{")
    assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()
    body = chat(stream=True, max_tokens=None)
    with socket.create_connection((host, int(port))) as silent:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        silent.sendall(head.encode() + body)
        while not endless.generator.open_ids:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(endless.generator.all_closed.wait(), 30)


async def test_memory_comes_back(api: Api) -> None:
    """After each of them many times, a process holds no more than it did after the first few rounds."""

    async def round_of_all(client: httpx.AsyncClient) -> None:
        for cases in CASES.values():
            for sent in cases:
                await client.post(sent.path, content=sent.body, headers=JSON | sent.headers)

    async with api.client() as client:
        await round_of_all(client)
        gc.collect()
        before = resident_bytes(os.getpid())
        for _ in range(3):
            await round_of_all(client)
        gc.collect()
        assert resident_bytes(os.getpid()) - before < 64 << 20
