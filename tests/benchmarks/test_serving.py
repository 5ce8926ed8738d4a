"""The whole benchmark against a small server that speaks the API: loops, failures, CPU accounting."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from benchmarks.client import CompletionsClient, closed_loop, open_loop
from benchmarks.serving import cpu_seconds, ingress_pids, parse_arguments, run


class FakeServer:
    """Answers completions of token ids with two events; keeps what it was asked and how many at a time."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, object]] = []
        self.num_open = 0
        self.max_open = 0
        self.failure: str | None = None

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.failure == "refused":
            return web.json_response({"error": {"message": "full"}}, status=503)
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self._stream(response, body)
        self.num_open -= 1
        return response

    async def _stream(self, response: web.StreamResponse, body: dict[str, object]) -> None:
        for _ in range(2):
            await asyncio.sleep(0.005)
            await _send(response, {"choices": [{"index": 0, "text": "a"}], "usage": None})
        if self.failure == "broken":
            await _send(response, {"error": {"message": "engine lost"}})
        usage = {
            "prompt_tokens": len(body["prompt"]),  # type: ignore[arg-type]
            "completion_tokens": body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        await _send(response, {"choices": [], "usage": usage})
        if self.failure != "cut":
            await response.write(b"data: [DONE]\n\n")

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def cluster(self, _: web.Request) -> web.Response:
        return web.json_response({"ingresses": [{"pid": os.getpid()}]})


async def _send(response: web.StreamResponse, event: object) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    app = web.Application()
    app.router.add_post("/v1/completions", fake.completions)
    app.router.add_get("/v1/models", fake.models)
    app.router.add_get("/v1/cluster", fake.cluster)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[CompletionsClient]:
    client = CompletionsClient(server.url + "/", timeout_s=5.0)
    client.model = "tiny"
    yield client
    await client.close()


async def test_the_closed_loop_keeps_its_concurrency(server: FakeServer, client: CompletionsClient) -> None:
    records = await closed_loop(client, [[1, 2, 3]] * 12, output_len=7, concurrency=3)
    assert len(records) == 12
    assert server.max_open == 3
    assert {(record.num_prompt_tokens, record.num_output_tokens, record.num_cached_tokens) for record in records} == {
        (3, 7, 2)
    }
    for record in records:
        assert record.error is None
        first_s, last_s = record.event_times_s
        assert record.sent_s < first_s < last_s <= record.ended_s


async def test_the_open_loop_does_not_wait_for_answers(server: FakeServer, client: CompletionsClient) -> None:
    records = await open_loop(client, [[1]] * 10, output_len=7, arrivals_s=iter([0.0] * 10))
    assert len(records) == 10
    assert server.max_open == 10


@pytest.mark.parametrize(
    ("failure", "message"),
    [("refused", "HTTP 503"), ("broken", "engine lost"), ("cut", r"without [DONE]")],
)
async def test_failures_are_recorded(server: FakeServer, client: CompletionsClient, failure: str, message: str) -> None:
    server.failure = failure
    record = await client.complete([1], 7)
    assert record.error is not None
    assert message in record.error


async def test_a_server_that_is_not_there_is_a_failure_too() -> None:
    client = CompletionsClient("http://127.0.0.1:9", timeout_s=5.0)
    record = await client.complete([1], 7)
    await client.close()
    assert record.error is not None
    assert "ClientConnectorError" in record.error


@pytest.mark.parametrize("load", [["--concurrency", "4"], ["--rate", "500"]])
async def test_a_run_end_to_end(server: FakeServer, load: list[str]) -> None:
    lengths = ["--num-requests", "10", "--num-warmup", "2", "--input-len", "20", "--output-len", "6"]
    args = parse_arguments(["--base-url", server.url, "--prefix-len", "16", "--frontend-overhead", *lengths, *load])
    outcome = await run(args)
    assert (outcome.report.num_succeeded, outcome.report.num_output_tokens) == (10, 60)
    assert outcome.ingress_cpu_us_per_token is not None
    assert outcome.ingress_cpu_us_per_token >= 0
    warm_up, measured = server.bodies[:2], server.bodies[2:]
    assert len({tuple(body["prompt"][:16]) for body in measured}) == 1  # type: ignore[index]
    assert {body["model"] for body in warm_up + measured} == {"tiny"}
    assert warm_up[0]["prompt"] not in [body["prompt"] for body in measured]


def test_cpu_time_is_read_behind_a_program_name_with_blanks_and_parentheses(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    for pid, (user, system) in {7: (3 * ticks, ticks), 8: (0, 2 * ticks)}.items():
        (tmp_path / str(pid)).mkdir()
        before = " ".join(["S", *["0"] * 10])
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (ray::(x) y) {before} {user} {system} 0 0 20\n")
    assert cpu_seconds([7, 8], proc=tmp_path) == 6.0
    assert cpu_seconds([]) == 0
    assert ingress_pids({"ingresses": [{"pid": 7}, {"pid": 8}]}) == [7, 8]


def test_own_cpu_time_is_what_the_system_says() -> None:
    before_s = sum(os.times()[:2])
    measured_s = cpu_seconds([os.getpid()])
    assert before_s - 0.05 <= measured_s <= sum(os.times()[:2]) + 0.05
