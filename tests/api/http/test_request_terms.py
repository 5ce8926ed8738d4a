"""How long a client waits and how urgent its request is: from headers and bodies to what engines are told."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from atom_cluster.api.protection.keys import hash_key
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


ENTRIES = {
    "usual": "",
    "urgent": ", most_urgent_priority: -5",
    "batch": ", most_urgent_priority: 20",
    "boss": ", role: admin",
    "bound boss": ", role: admin, most_urgent_priority: 0",
}


@pytest.fixture
def guarded(make_api: MakeApi, tmp_path: Path) -> Callable[..., Api]:
    """An API with a key of each entry, which are their names."""

    def make(**protection: object) -> Api:
        path = tmp_path / "keys.yaml"
        path.write_text(
            "".join(
                f"- {{name: {name.replace(' ', '-')}, sha256: {hash_key(name)}{rest}}}\n"
                for name, rest in ENTRIES.items()
            )
        )
        return make_api(lambda request: [(1,), "stop"], protection={"api_keys_file": str(path), **protection})

    return make


@pytest.mark.parametrize(
    ("key", "asked", "given"),
    [
        ("usual", None, 0),
        ("usual", 0, 0),
        ("usual", 100, 100),
        ("usual", -1, None),
        ("urgent", None, 0),
        ("urgent", -5, -5),
        ("urgent", -6, None),
        ("batch", None, 20),
        ("batch", 20, 20),
        ("batch", 0, None),
        ("boss", -100, -100),
        ("bound boss", -1, None),
    ],
)
async def test_a_key_is_as_urgent_as_its_entry_lets_it_be(
    guarded: Callable[..., Api], key: str, asked: int | None, given: int | None
) -> None:
    api = guarded()
    header = "X-Request-Priority"
    ways: list[tuple[dict[str, object], dict[str, str], str]] = [({}, {}, header)]
    if asked is not None:
        ways = [({}, {header: str(asked)}, header), ({"priority": asked}, {}, "priority")]
    async with api.client() as client:
        for fields, headers, param in ways:
            answer = await client.post("/v1/completions", json=TEXT | fields, headers=headers | {"x-api-key": key})
            if given is None:
                error = answer.json()["error"]
                assert (answer.status_code, error["param"], error["type"]) == (403, param, "permission_error")
                assert param in error["message"]
            else:
                assert answer.status_code == 200
    assert [request.priority for request in api.generator.requests] == ([] if given is None else [given] * len(ways))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_every_endpoint_refuses_what_is_more_urgent_than_its_key(guarded: Callable[..., Api], path: str) -> None:
    api = guarded()
    body = {"/v1/completions": TEXT, "/v1/responses": {"model": MODEL, "input": "hi"}}.get(path, CHAT)
    body = body | ({"max_tokens": 4} if path == "/v1/messages" else {})
    async with api.client() as client:
        for fields, headers in (({"priority": -1}, {}), ({}, {"X-Request-Priority": "-1"})):
            answer = await client.post(path, json=body | fields, headers=headers | {"x-api-key": "usual"})
            assert (answer.status_code, "got -1" in answer.text) == (403, True), answer.text
        assert (await client.post(path, json=body | {"priority": 1}, headers={"x-api-key": "usual"})).status_code == 200
    assert [request.priority for request in api.generator.requests] == [1]


async def test_the_configuration_says_it_for_keys_that_do_not(guarded: Callable[..., Api]) -> None:
    api = guarded(most_urgent_priority=-2)
    async with api.client() as client:
        for key, priority, status in (("usual", -2, 200), ("usual", -3, 403), ("urgent", -5, 200), ("batch", 0, 403)):
            answer = await client.post(
                "/v1/completions", json=TEXT | {"priority": priority}, headers={"x-api-key": key}
            )
            assert answer.status_code == status, key


async def test_a_priority_out_of_range_is_named(api: Api) -> None:
    async with api.client() as client:
        answer = await client.post("/v1/completions", json={**TEXT, "priority": 101})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")
