"""Ids of requests: the client's where it is fit, on every answer, and no key to anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from atom_cluster.api.routes import create_app
from tests.api.conftest import MODEL, Api

MakeApi = Callable[..., Api]
TEXT = {"model": MODEL, "prompt": "hi"}


@pytest.fixture
def api(make_api: MakeApi) -> Api:
    return make_api(lambda request: [(1,), "stop"])


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", TEXT, 200),
        ("/v1/completions", {**TEXT, "stream": True}, 200),
        ("/v1/completions", {}, 400),
        ("/nowhere", TEXT, 404),
        ("/health", TEXT, 405),
    ],
)
async def test_every_answer_repeats_the_client_s_id(api: Api, path: str, body: dict, status: int) -> None:
    async with api.client() as client:
        answer = await client.post(path, json=body, headers={"X-Request-Id": "order:7+a-b_c.d=@"})
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (status, ["order:7+a-b_c.d=@"])


async def test_an_unexpected_error_has_an_id_too(make_api: MakeApi) -> None:
    api = make_api(lambda request: [KeyError("bug")])
    async with api.client(raises=False) as client:
        answer = await client.post("/v1/completions", json=TEXT, headers={"X-Request-Id": "x"})
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (500, ["x"])


@pytest.mark.parametrize("unfit", ["", "a b", "a\u00e4", "x" * 129, '"', "-a", "a;b", "a/b"])
async def test_an_unfit_id_is_replaced(api: Api, unfit: str) -> None:
    async with api.client() as client:
        answer = await client.get("/health", headers={b"X-Request-Id": unfit.encode("latin-1")})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"].startswith("req-")


async def test_made_ids_differ(api: Api) -> None:
    async with api.client() as client:
        answers = [await client.get("/health") for _ in range(2)]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 2


async def test_behind_a_proxy_that_answers_with_the_id_there_is_no_second_one(api: Api) -> None:
    api.app = create_app(**api.parts, proxy_sends_request_id=True)
    async with api.client() as client:
        answer = await client.get("/health", headers={"X-Request-Id": "a"})
    assert "x-request-id" not in answer.headers
    api.generator.script = lambda request: [KeyError("bug")]
    async with api.client(raises=False) as client:
        answer = await client.post("/v1/completions", json=TEXT)
    assert answer.status_code == 500 and "x-request-id" not in answer.headers


async def test_the_same_id_at_once_is_two_requests(make_api: MakeApi) -> None:
    both = asyncio.Event()

    def script(request: object) -> list[object]:
        if len(api.generator.open_ids) == 2:
            both.set()
        return [both, (1,), "stop"]

    api = make_api(script)
    async with api.client() as client:
        ask = [client.post("/v1/completions", json=TEXT, headers={"X-Request-Id": "same"}) for _ in range(2)]
        answers = await asyncio.gather(*ask)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len({request.request_id for request in api.generator.requests}) == 2
    assert len({answer.json()["id"] for answer in answers}) == 2
