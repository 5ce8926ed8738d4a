"""Who may use the API, seen by clients: over the whole application."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from atom_cluster.api.protection.access import ACCESS_BY_ROUTE
from atom_cluster.api.protection.keys import hash_key
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.errors import Overloaded
from atom_cluster.observability.metrics import HTTP_REQUESTS, KEY_REQUESTS, KEY_TOKENS
from tests.api.conftest import MODEL, Api
from tests.api.protection.test_access import OPEN

MakeApi = Callable[..., Api]

CHAT = "/v1/chat/completions"
KEYS = {"user": "the user's key", "monitor": "the monitor's key", "admin": "the admin's key"}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    lines = [f"- {{name: the-{role}, sha256: {hash_key(key)}, role: {role}}}\n" for role, key in KEYS.items()]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def make(make_api: MakeApi, tokenizer: Tokenizer, keys_file: Path) -> Callable[..., Api]:
    def make(**protection: object) -> Api:
        script = [*[(token_id,) for token_id in tokenizer.encode("Hello")], "stop"]
        return make_api(lambda request: script, protection={"api_keys_file": str(keys_file), **protection})

    return make


def chat(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "temperature": 0, **fields}


def bearer(role: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[role]}"}


def requests_of(api: Api) -> list[tuple[str, str]]:
    """Method and path of everything the application answers."""
    return [
        (method, route.path.replace("{model_id:path}", MODEL).replace("{request_id}", "r"))  # type: ignore[attr-defined]
        for route in api.app.router.routes
        for method in sorted(getattr(route, "methods", None) or {"GET"})
    ]


async def test_without_a_key_every_route_but_the_probes_is_closed(make: Callable[..., Api]) -> None:
    api = make()
    async with api.client() as client:
        for method, path in [*requests_of(api), ("GET", "/debug/pprof"), ("DELETE", "/v1/models")]:
            answer = await client.request(method, path)
            if path in OPEN:
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, (method, path)
            if path != "/v1/messages" and method != "HEAD":
                assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert not api.generator.requests


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": KEYS["admin"]},
        {"Authorization": f"Token {KEYS['admin']}"},
        {"Authorization": f"Bearer {hash_key(KEYS['admin'])}"},
        {"x-api-key": ""},
        {"x-api-key": "x" * 10_000},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic " + base64.b64encode(f"u:{KEYS['admin']}".encode()).decode()},
        {"Cookie": f"key={KEYS['admin']}"},
    ],
)
async def test_what_is_no_key_does_not_open_anything(make: Callable[..., Api], headers: dict[str, str]) -> None:
    api = make()
    async with api.client() as client:
        for path in (CHAT, "/start_profile"):
            assert (await client.post(path, json=chat(), headers=headers)).status_code == 401


@pytest.mark.parametrize("role", KEYS)
async def test_a_key_opens_what_its_role_may_use(make: Callable[..., Api], role: str) -> None:
    api = make()
    async with api.client() as client:
        for method, path in requests_of(api):
            template = path.replace(f"/v1/models/{MODEL}", "/v1/models/{model_id:path}")
            template = template.replace("/requests/r/", "/requests/{request_id}/")
            access = ACCESS_BY_ROUTE.get(template, "admin")
            answer = await client.request(method, path, headers=bearer(role))
            is_allowed = role == "admin" or access in ("open", "any key", role)
            assert (answer.status_code == 403) != is_allowed, (method, path, answer.status_code)
            assert answer.status_code != 401
        assert (await client.get("/v1/nothing", headers=bearer(role))).status_code == 404


async def test_both_ways_to_give_a_key_are_taken_and_a_third_from_browsers(make: Callable[..., Api]) -> None:
    api = make()
    async with api.client() as client:
        for headers in (bearer("user"), {"authorization": f"bearer  {KEYS['user']}"}, {"X-Api-Key": KEYS["user"]}):
            assert (await client.post(CHAT, json=chat(), headers=headers)).status_code == 200
        page = await client.get("/metrics", headers={"Accept": "text/html,*/*"})
        assert page.headers["WWW-Authenticate"].startswith("Basic ")
        assert (await client.get("/metrics", auth=("anybody", KEYS["monitor"]))).status_code == 200


async def test_keys_come_and_go_without_a_restart(make: Callable[..., Api], keys_file: Path) -> None:
    api = make(api_keys_poll_s=1e-6)
    async with api.client() as client:
        assert (await client.post(CHAT, json=chat(), headers=bearer("user"))).status_code == 200
        keys_file.write_text(f"- {{name: new, sha256: {hash_key('new')}}}\n")
        assert (await client.post(CHAT, json=chat(), headers=bearer("user"))).status_code == 401
        assert (await client.post(CHAT, json=chat(), headers={"x-api-key": "new"})).status_code == 200


async def test_names_are_told_and_keys_are_not(
    make: Callable[..., Api], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("atom_cluster"), "propagate", True)
    caplog.set_level("DEBUG")
    api = make()
    async with api.client() as client:
        answers = [
            await client.post(CHAT, json=chat(), headers=bearer("user")),
            await client.post("/start_profile", headers=bearer("user")),
            await client.post(CHAT, json=chat(), headers={"x-api-key": "a wrong key"}),
        ]
    assert [answer.status_code for answer in answers] == [200, 403, 401]
    for key in (*KEYS.values(), "a wrong key"):
        assert key not in caplog.text and not any(key in answer.text for answer in answers)
    assert api.metrics.value(KEY_REQUESTS, key="the-user", outcome="admitted") == 1
    assert api.metrics.value(KEY_REQUESTS, key="the-user", outcome="insufficient_permissions") == 1
    assert api.metrics.value(KEY_REQUESTS, key="anonymous", outcome="invalid_api_key") == 1
    assert (
        api.metrics.value(KEY_TOKENS, key="the-user", kind="output") == answers[0].json()["usage"]["completion_tokens"]
    )
    assert api.metrics.value(KEY_TOKENS, key="the-user", kind="prompt") == answers[0].json()["usage"]["prompt_tokens"]
    assert api.metrics.value(HTTP_REQUESTS, route=CHAT, status="401") == 1


async def test_each_key_has_its_own_limits_or_the_default_ones(make: Callable[..., Api], keys_file: Path) -> None:
    lines = "".join(
        f"- {{name: {name}, sha256: {hash_key(name)}{rest}}}\n"
        for name, rest in (("few", ", requests_per_minute: 1"), ("usual", ""), ("free", ", tokens_per_minute: 9"))
    )
    keys_file.write_text(lines)
    api = make(limits={"requests_per_minute": 2})
    async with api.client() as client:

        async def ask(name: str) -> httpx.Response:
            return await client.post(CHAT, json=chat(max_tokens=1), headers={"x-api-key": name})

        first, second = await ask("few"), await ask("few")
        assert (first.status_code, second.status_code) == (200, 429)
        assert first.headers["x-ratelimit-limit-requests"] == "1"
        assert first.headers["x-ratelimit-remaining-requests"] == "0"
        assert "x-ratelimit-limit-tokens" not in first.headers
        assert 55 <= int(second.headers["Retry-After"]) <= 60
        error = second.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert [(await ask("usual")).status_code for _ in range(3)] == [200, 200, 429]
        # The first answer took more tokens than a minute has.
        assert [(await ask("free")).status_code for _ in range(2)] == [200, 429]
        # Reading is not limited.
        assert (await client.get("/v1/models", headers={"x-api-key": "few"})).status_code == 200
    assert api.metrics.value(KEY_REQUESTS, key="free", outcome="tokens_per_minute") == 1


async def test_without_keys_all_clients_share_one_budget(make_api: MakeApi) -> None:
    api = make_api(lambda request: ["stop"], protection={"limits": {"requests_per_minute": 3}})
    async with api.client() as client:
        statuses = [(await client.post(CHAT, json=chat())).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        assert (await client.get("/metrics")).status_code == 200


async def test_what_did_not_happen_costs_no_tokens(make_api: MakeApi) -> None:
    limits = {"limits": {"tokens_per_minute": 1000}}
    api = make_api(lambda request: [Overloaded("full")], protection=limits)
    async with api.client() as client:
        assert (await client.post(CHAT, json=chat())).status_code == 503
        assert (await client.post(CHAT, json={"no": "request"})).status_code == 400
        answer = await client.post(CHAT, content=b"x" * 200, headers={"content-type": "application/json"})
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) >= 1000 - 200 // 4


async def test_so_many_requests_are_open_and_no_more_and_bodies_of_others_are_not_read(make_api: MakeApi) -> None:
    go = asyncio.Event()
    api = make_api(lambda request: [go, "stop"], protection={"max_open_requests": 2})
    async with api.client() as client:
        tasks = [asyncio.create_task(client.post(CHAT, json=chat())) for _ in range(2)]
        while len(api.generator.open_ids) < 2:
            await asyncio.sleep(0.001)

        async def body() -> object:
            raise AssertionError("nobody is to read this")
            yield b""

        refused = await client.post(CHAT, content=body())  # type: ignore[arg-type]
        assert refused.status_code == 503 and refused.headers["Retry-After"] in ("1", "2")
        assert (await client.get("/ready")).status_code == 200
        go.set()
        assert [(await task).status_code for task in tasks] == [200, 200]
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_headers_are_limited_in_number_and_size(make_api: MakeApi) -> None:
    api = make_api(lambda request: ["stop"], protection={"max_headers": 20, "max_header_bytes": 2000})
    async with api.client() as client:
        for path, headers in (
            ("/health", {f"x-{number}": "1" for number in range(30)}),
            ("/health", {"x": "y" * 2000}),
            ("/v1/models/" + "y" * 2000, {}),
            ("/health?" + "y" * 2000, {}),
        ):
            answer = await client.get(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (431, "headers_too_large")
        assert (await client.get("/health", headers={"x": "y" * 500})).status_code == 200


async def test_prompts_may_be_limited_below_the_models_context(make_api: MakeApi) -> None:
    api = make_api(lambda request: ["stop"], max_prompt_tokens=5)
    async with api.client() as client:
        body = {"model": MODEL, "prompt": [1] * 5, "max_tokens": 1}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        answer = await client.post("/v1/completions", json=body | {"prompt": [1] * 6})
        error = json.loads(answer.text)["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")


async def test_a_websocket_does_not_go_past_the_gate(make: Callable[..., Api]) -> None:
    api = make()
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    @api.app.websocket("/new")
    async def new(socket: object) -> None:
        raise AssertionError("nobody is to get here")

    scope = {"type": "websocket", "path": "/new", "headers": [], "query_string": b"", "subprotocols": []}
    await api.app(scope, receive, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]
