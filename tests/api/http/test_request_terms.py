"""How long a client waits and how urgent its request is: from headers and bodies to what engines are told."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from atom_cluster.errors import RequestTimeout
from tests.api.conftest import MODEL, Api

MakeApi = Callable[..., Api]
TEXT = {"model": MODEL, "prompt": "hi"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def api(make_api: MakeApi) -> Api:
    return make_api(lambda request: [(1,), "stop"])


async def test_the_deadline_counts_from_the_arrival_and_goes_with_every_output(api: Api) -> None:
    before_s = time.monotonic()
    async with api.client() as client:
        body = {**TEXT, "n": 2}
        answer = await client.post("/v1/completions", json=body, headers={"X-Request-Timeout-Ms": "60000"})
    assert answer.status_code == 200
    deadlines = {request.deadline for request in api.generator.requests}
    assert len(deadlines) == 1
    (deadline,) = deadlines
    assert deadline is not None and before_s + 60 <= deadline.at_s <= time.monotonic() + 60


async def test_without_the_header_the_configuration_decides(api: Api) -> None:
    async with api.client() as client:
        await client.post("/v1/completions", json=TEXT)
    assert (api.generator.requests[0].deadline, api.generator.requests[0].priority) == (None, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_passed_deadline_is_a_504(make_api: MakeApi, stream: bool) -> None:
    api = make_api(lambda request: [RequestTimeout("too late")])
    async with api.client() as client:
        answer = await client.post("/v1/completions", json={**TEXT, "stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_the_body_s_priority_wins_over_the_header_s(api: Api, path: str) -> None:
    body = TEXT if path == "/v1/completions" else CHAT
    async with api.client() as client:
        for fields, headers in (({}, {"X-Request-Priority": "-5"}), ({"priority": 7}, {"X-Request-Priority": "-5"})):
            assert (await client.post(path, json={**body, **fields}, headers=headers)).status_code == 200
    assert [request.priority for request in api.generator.requests] == [-5, 7]


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Request-Timeout-Ms", "0"),
        ("X-Request-Timeout-Ms", "1.5"),
        ("X-Request-Timeout-Ms", "99999999999"),
        ("X-Request-Timeout-Ms", "soon"),
        ("X-Request-Priority", "101"),
        ("X-Request-Priority", ""),
    ],
)
async def test_headers_out_of_range_are_named(api: Api, header: str, value: str) -> None:
    async with api.client() as client:
        answer = await client.post("/v1/completions", json=TEXT, headers={header: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, header)
    assert not api.generator.requests


async def test_a_header_given_twice_is_refused(api: Api) -> None:
    headers = [("X-Request-Timeout-Ms", "5"), ("X-Request-Timeout-Ms", "6")]
    async with api.client() as client:
        assert (await client.post("/v1/completions", json=TEXT, headers=headers)).status_code == 400


async def test_a_priority_out_of_range_is_named(api: Api) -> None:
    async with api.client() as client:
        answer = await client.post("/v1/completions", json={**TEXT, "priority": 101})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")
