"""What is recorded of an HTTP request, whatever becomes of it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from atom_cluster.api.generator import FoundTimeline, GenerateInput
from atom_cluster.api.http.request_record import Recorder
from atom_cluster.api.routes import create_app
from atom_cluster.api.text.model_files import ServedModel
from atom_cluster.api.text.tokenizer import TokenizerService
from atom_cluster.config.serving import ApiConfig
from atom_cluster.observability.access_log import LOGGER, AccessLog
from atom_cluster.observability.timeline import RequestRecord, Timeline
from atom_cluster.observability.timeline_store import TimelineStore
from tests.api.conftest import MODEL
from tests.api.fake_generator import FakeGenerator

BODY = {"model": MODEL, "prompt": "abc", "max_tokens": 3}
PROMPT_IDS = 3


class KeepingTracer:
    """Keeps what would be traced."""

    def __init__(self) -> None:
        self.traced: list[tuple[RequestRecord, Timeline]] = []

    def trace(self, record: RequestRecord, timeline: Timeline) -> None:
        self.traced.append((record, timeline))


class Recorded:
    """An app whose generator says three tokens, and what is recorded of its requests."""

    def __init__(self, model_directory: Path, service: TokenizerService) -> None:
        self.hold = asyncio.Event()
        self.hold.set()
        self.error: Exception | None = None
        self.generator = FakeGenerator(self.script)
        self.store = TimelineStore(10)
        self.tracer = KeepingTracer()
        self.app = create_app(
            generator=self.generator,
            tokenizer=service,
            model=ServedModel.from_directory(model_directory, served_name=MODEL),
            limits=ApiConfig(),
            recorder=Recorder(
                ingress="ingress-1",
                store=self.store,
                access_log=AccessLog(),
                tracer=self.tracer,  # type: ignore[arg-type]
            ),
        )

    def script(self, request: GenerateInput) -> Any:
        return [(5,), self.hold, self.error or (6, 7), "length"]

    async def send(self, method: str, path: str, body: object = None, **headers: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://api") as client:
            return await client.request(method, path, json=body, headers=headers)


@pytest.fixture
def recorded(model_directory: Path, service: TokenizerService) -> Recorded:
    return Recorded(model_directory, service)


def fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["atom_fields"] for record in caplog.records if record.name == LOGGER]


async def test_a_request_becomes_a_line_a_timeline_and_a_trace(
    recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    traceparent = f"00-{'1' * 32}-{'2' * 16}-01"
    with caplog.at_level(logging.INFO, LOGGER):
        answer = (
            await recorded.send("POST", "/v1/completions", BODY, traceparent=traceparent, **{"x-request-id": "mine"})
        ).json()
    (line,) = fields(caplog)
    assert (line["request_id"], line["id"], line["status"]) == ("mine", answer["id"], 200)
    assert (line["route"], line["prompt_tokens"]) == ("/v1/completions", PROMPT_IDS)
    ((record, timeline),) = recorded.tracer.traced
    assert (record.traceparent, record.finish_reasons, timeline.id) == (traceparent, ("length",), answer["id"])
    found = (await recorded.send("GET", "/v1/requests/mine/timeline")).json()
    assert found["id"] == answer["id"] and found["ingress"] == "ingress-1"
    # The generator noted nothing: all of its time is one span.
    assert [span["name"] for span in found["outputs"][0]["spans"]] == ["read", "check", "answer"]


async def test_engines_learn_the_clients_id(recorded: Recorded) -> None:
    await recorded.send("POST", "/v1/completions", BODY, **{"x-request-id": "mine"})
    (request,) = recorded.generator.requests
    assert request.record.client_request_id == "mine" and request.request_id.startswith("cmpl-")


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/v1/completions", {**BODY, "max_tokens": -1}, 400, "InvalidRequest"),
        ("/v1/completions", {**BODY, "model": "other"}, 404, "UnknownModel"),
        ("/v1/nothing", {}, 404, None),
    ],
)
async def test_a_refused_request_has_a_line_and_no_timeline(
    recorded: Recorded, caplog: pytest.LogCaptureFixture, path: str, body: object, status: int, error: str | None
) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        await recorded.send("POST", path, body, **{"x-request-id": "mine"})
    (line,) = fields(caplog)
    assert (line["status"], line.get("error")) == (status, error)
    assert "nothing" not in line["route"]
    assert not recorded.tracer.traced
    assert (await recorded.send("GET", "/v1/requests/mine/timeline")).status_code == 404


async def test_a_request_that_fails_inside_is_kept_with_its_error(recorded: Recorded) -> None:
    recorded.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        await recorded.send("POST", "/v1/completions", BODY, **{"x-request-id": "mine"})
    found = (await recorded.send("GET", "/v1/requests/mine/timeline")).json()
    assert (found["status"], found["error"]) == (500, "RuntimeError")


async def test_while_it_runs_its_timeline_is_not_there_yet(recorded: Recorded) -> None:
    recorded.hold.clear()
    running = asyncio.create_task(recorded.send("POST", "/v1/completions", BODY, **{"x-request-id": "mine"}))
    await asyncio.sleep(0)
    while not recorded.generator.open_ids:
        await asyncio.sleep(0.001)
    answer = await recorded.send("GET", "/v1/requests/mine/timeline")
    assert answer.status_code == 404 and "still running" in answer.json()["error"]["message"]
    recorded.hold.set()
    await running
    assert (await recorded.send("GET", "/v1/requests/mine/timeline")).status_code == 200


async def test_what_is_not_known_here_is_asked_of_other_ingresses(recorded: Recorded) -> None:
    recorded.generator.found_timeline = FoundTimeline(text=b'{"id": "cmpl-1"}', num_asked=2)
    assert (await recorded.send("GET", "/v1/requests/cmpl-1/timeline")).json() == {"id": "cmpl-1"}
    recorded.generator.found_timeline = FoundTimeline(num_asked=2, silent=("ingress-3",))
    error = (await recorded.send("GET", "/v1/requests/cmpl-1/timeline")).json()["error"]
    assert error["param"] == "id" and "last 10" in error["message"]
    assert "2 others" in error["message"] and "ingress-3 did not answer" in error["message"]
    recorded.generator.found_timeline = FoundTimeline(num_asked=1, is_running=True)
    error = (await recorded.send("GET", "/v1/requests/cmpl-1/timeline")).json()["error"]
    assert "still running" in error["message"]
