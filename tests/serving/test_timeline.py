"""Timelines over real engines and sockets, one process: HTTP in, simulated devices behind, spans that add up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from atom_cluster.api.http.request_record import Recorder
from atom_cluster.api.routes import create_app
from atom_cluster.api.text.model_files import ServedModel
from atom_cluster.api.text.tokenizer import TokenizerService
from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.config.parallel import GroupConfig
from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.serving import ApiConfig
from atom_cluster.config.simulation import SimulationConfig
from atom_cluster.engine.sim_runner import SimulatedRunner
from atom_cluster.engine_server.host import EngineHost
from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import MemberCard, Membership, PeerAddress, Role
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.timeline_store import TimelineStore
from atom_cluster.serving import timeline_calls
from atom_cluster.serving.cluster_client import ClusterClient
from tests.api.tiny_tokenizers import VOCAB_SIZE, write_model_directory
from tests.engine_server.conftest import SECRET, eventually, make_settings

ROUTER = PeerAddress(peer_id="router", endpoint="tcp://127.0.0.1:1", epoch=1)
STEP_S, PROMPT_TOKEN_S = 0.004, 0.0005
PROMPT, NUM_TOKENS = "a prompt that takes several chunks on the way", 6


class Front:
    """One ingress: the API over its own client and endpoint."""

    def __init__(self, name: str, model_directory: Path, tokenizer: TokenizerService) -> None:
        self.store = TimelineStore(100)
        model = ServedModel.from_directory(model_directory, served_name="m")
        self.metrics = MemoryMetrics()
        self.client = ClusterClient(
            config=ClusterConfig(model="m", unified=GroupConfig()),
            reasons={},
            model=model,
            metrics=self.metrics,
            timelines=self.store,
        )
        self.endpoint = Endpoint(
            key=ClusterKey.from_secret(SECRET),
            peer_id=name,
            host="127.0.0.1",
            epoch=1,
            on_message=self.client.receive,
            on_lost=self.client.lose,
            ping_period_s=0.2,
        )
        self.app = create_app(
            generator=self.client,
            tokenizer=tokenizer,
            model=model,
            limits=ApiConfig(),
            recorder=Recorder(ingress=name, store=self.store),
        )

    async def get(self, path: str) -> httpx.Response:
        async with self.http() as http:
            return await http.get(path)

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://api")

    async def complete(self, **body: object) -> dict[str, Any]:
        """An answer, with its timeline under `timeline`."""
        wanted = {"model": "m", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, **body}
        async with self.http() as http:
            answer = await http.post("/v1/completions", json=wanted)
            assert answer.status_code == 200, answer.text
            result: dict[str, Any] = answer.json()
            found = await http.get(f"/v1/requests/{result['id']}/timeline")
        assert found.status_code == 200, found.text
        result["timeline"] = found.json()
        return result


@dataclass
class Site:
    """Fronts and engines, which all know each other; no router."""

    model_directory: Path
    tokenizer: TokenizerService
    fronts: list[Front] = field(default_factory=list)
    hosts: dict[str, EngineHost] = field(default_factory=dict)
    cards: dict[str, MemberCard] = field(default_factory=dict)

    async def front(self, name: str = "ingress-1") -> Front:
        front = Front(name, self.model_directory, self.tokenizer)
        card = MemberCard(address=await front.endpoint.start(), kind="ingress")
        front.client.attach(front.endpoint)
        self.fronts.append(front)
        self.cards[name] = card
        self.announce()
        return front

    async def engine(self, name: str, role: Role) -> EngineHost:
        runner = SimulatedRunner(
            simulation=SimulationConfig(
                base_s=STEP_S,
                per_prefill_token_s=PROMPT_TOKEN_S,
                per_decode_row_s=0.0,
                num_blocks=2048,
                vocab_size=VOCAB_SIZE,
            ),
            block_size=4,
            max_num_requests=8,
            max_model_len=512,
        )
        settings = make_settings(name, role, scheduler=SchedulerConfig(max_num_batched_tokens=16))
        host = EngineHost(runner=runner, settings=settings, metrics=MemoryMetrics())
        self.cards[name] = await asyncio.to_thread(host.start)
        self.hosts[name] = host
        self.announce()
        return host

    def announce(self) -> None:
        for front in self.fronts:
            front.client.update(Membership(router=ROUTER, members=tuple(self.cards.values())))

    async def end(self, name: str) -> None:
        await asyncio.to_thread(self.hosts.pop(name).close)
        del self.cards[name]

    async def close(self) -> None:
        for name in list(self.hosts):
            await self.end(name)
        for front in self.fronts:
            await front.endpoint.close()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    directory = write_model_directory(tmp_path)
    tokenizer = TokenizerService.from_directory(directory)
    site = Site(directory, tokenizer)
    yield site
    await site.close()
    tokenizer.close()


def checked(answer: dict[str, Any], index: int = 0) -> list[dict[str, Any]]:
    """The spans of one output, which follow each other and take as long as the request took."""
    timeline = answer["timeline"]
    output = timeline["outputs"][index]
    position = 0.0
    for span in output["spans"]:
        assert abs(span["start_s"] - position) < 1e-5, span
        assert span["duration_s"] > 0, span
        position += span["duration_s"]
    assert abs(position - timeline["latency_s"]) < 1e-4
    # What usage says ends with the last token, before the answer is written.
    assert answer["usage"]["latency_s"] <= timeline["latency_s"]
    assert output["ttft_s"] <= answer["usage"]["ttft_s"] + answer["timeline"]["latency_s"]
    spans: list[dict[str, Any]] = output["spans"]
    return spans


def seconds_in(spans: list[dict[str, Any]], name: str, replica: str) -> float:
    return sum(float(span["duration_s"]) for span in spans if (span["name"], span.get("replica")) == (name, replica))


def names(spans: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """In order, as name and replica, without what may be there or not."""
    return [
        (span["name"], span.get("replica", ""))
        for span in spans
        if span["name"] not in ("wire", "queue", "step_wait", "kv_transfer")
    ]


async def test_of_a_unified_engine_every_part_is_known(site: Site) -> None:
    front, _ = await site.front(), await site.engine("unified-1", "unified")
    answer = await front.complete()
    spans = checked(answer)
    engine = [("prefill", "unified-1"), ("first_decode", "unified-1"), ("decode", "unified-1")]
    here = [(name, "ingress-1") for name in ("read", "check", "prepare", "route")]
    assert names(spans) == [*here, *engine, ("answer", "ingress-1")]
    # Steps of the simulated device take no less than they are told to.
    assert seconds_in(spans, "prefill", "unified-1") >= 3 * STEP_S + len(PROMPT) * PROMPT_TOKEN_S
    computing_s = sum(span["duration_s"] for span in spans if (span["name"], span.get("replica")) in engine)
    assert computing_s >= (3 + NUM_TOKENS - 1) * STEP_S + len(PROMPT) * PROMPT_TOKEN_S
    assert [span.get("num_steps") for span in spans if span["name"] == "prefill"] == [3]  # chunks of 16 tokens
    (attempt,) = answer["timeline"]["outputs"][0]["attempts"]
    assert (attempt["engine"], attempt["num_tokens"], attempt.get("prefill", "")) == ("unified-1", NUM_TOKENS, "")


async def test_of_a_pair_prefill_accounts_for_its_part(site: Site) -> None:
    front = await site.front()
    await site.engine("prefill-1", "prefill")
    await site.engine("decode-1", "decode")
    answer = await front.complete()
    spans = checked(answer)
    assert names(spans)[4:-1] == [
        ("prefill", "prefill-1"),
        ("publish", "prefill-1"),
        ("first_decode", "decode-1"),
        ("decode", "decode-1"),
    ]
    assert not any(span["name"] == "unattributed" for span in spans)
    assert seconds_in(spans, "prefill", "prefill-1") >= 3 * STEP_S + len(PROMPT) * PROMPT_TOKEN_S
    (attempt,) = answer["timeline"]["outputs"][0]["attempts"]
    assert (attempt["engine"], attempt["prefill"]) == ("decode-1", "prefill-1")
    assert attempt["kv_read_bytes"] > 0


async def test_outputs_of_one_request_have_a_row_each(site: Site) -> None:
    front, _ = await site.front(), await site.engine("unified-1", "unified")
    answer = await front.complete(n=2, prompt=[PROMPT, "another"], seed=1)
    assert len(answer["timeline"]["outputs"]) == answer["timeline"]["num_outputs"] == 4
    assert answer["timeline"]["num_prompt_tokens"] == answer["usage"]["prompt_tokens"]
    for index in range(4):
        assert names(checked(answer, index))[-1] == ("answer", "ingress-1")


async def test_a_request_whose_engine_is_stopped_has_a_part_for_each(site: Site) -> None:
    front, first = await site.front(), await site.engine("unified-1", "unified")
    running = asyncio.create_task(front.complete(max_tokens=60))
    await eventually(lambda: first.status().num_running == 1)
    await site.engine("unified-2", "unified")
    first.begin_drain(0.0)
    answer = await running
    spans = checked(answer)
    attempts = answer["timeline"]["outputs"][0]["attempts"]
    assert [attempt["engine"] for attempt in attempts] == ["unified-1", "unified-2"]
    assert attempts[0]["error"] == "NotReady" and "error" not in attempts[1]
    assert sum(attempt.get("num_tokens", 0) for attempt in attempts) == 60
    assert {span.get("attempt", 0) for span in spans} == {0, 1, 2}
    # The engine that was stopped had told where its time went, too.
    assert seconds_in(spans, "prefill", "unified-1") + seconds_in(spans, "queue", "unified-1") > 0
    assert seconds_in(spans, "prefill", "unified-2") > 0


async def test_a_request_whose_engine_dies_shows_what_nobody_can_tell(site: Site) -> None:
    front, first = await site.front(), await site.engine("unified-1", "unified")
    running = asyncio.create_task(front.complete(max_tokens=60))
    await eventually(lambda: any(stream.num_tokens > 2 for stream in front.client._streams.values()))
    await site.engine("unified-2", "unified")
    front.client.lose("unified-1")
    answer = await running
    spans = checked(answer)
    assert answer["timeline"]["outputs"][0]["attempts"][0]["error"] == "EngineLost"
    assert seconds_in(spans, "prefill", "unified-1") > 0  # told with its first token
    assert seconds_in(spans, "decode", "unified-1") > 0  # as seen from the ingress
    assert seconds_in(spans, "unattributed", "unified-1") > 0
    await eventually(first.is_idle)


async def test_waiting_for_an_engine_is_told(site: Site) -> None:
    front = await site.front()
    front.client.has_had_engines = True
    running = asyncio.create_task(front.complete())
    await eventually(lambda: front.client.has_open_requests)
    await site.engine("unified-1", "unified")
    assert names(checked(await running))[3:5] == [("wait_for_engine", "ingress-1"), ("route", "ingress-1")]


async def test_a_stop_string_ends_the_row_where_the_text_ends(site: Site) -> None:
    front, _ = await site.front(), await site.engine("unified-1", "unified")
    whole = await front.complete(max_tokens=40, seed=3)
    stop = whole["choices"][0]["text"][4:6]
    answer = await front.complete(max_tokens=40, seed=3, stop=[stop])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert names(checked(answer))[-2:] == [("decode", "unified-1"), ("answer", "ingress-1")]


async def test_a_refused_request_has_a_timeline_under_its_request_id(site: Site) -> None:
    front = await site.front()
    async with front.http() as http:
        body = {"model": "m", "prompt": "p"}
        answer = await http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
        assert answer.status_code == 503
        timeline = (await http.get("/v1/requests/mine/timeline")).json()
    assert (timeline["status"], timeline["error"], timeline["request_id"]) == (503, "NotReady", "mine")
    assert "ttft_s" not in timeline["outputs"][0]


async def test_any_ingress_answers_for_all(site: Site) -> None:
    front, other, _ = await site.front(), await site.front("ingress-2"), await site.engine("unified-1", "unified")
    answer = await front.complete()
    path = f"/v1/requests/{answer['id']}/timeline"
    assert (await other.get(path)).json() == (await front.get(path)).json() == answer["timeline"]
    # A third one that has just started knows nobody else's requests either, and says whom it asked.
    missing = await other.get("/v1/requests/cmpl-none/timeline")
    assert missing.status_code == 404
    error = missing.json()["error"]
    assert error["code"] == "request_not_found" and "1 others" in error["message"]


async def test_a_running_request_and_a_silent_ingress_are_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_calls, "ANSWER_TIMEOUT_S", 0.05)
    front, other, host = await site.front(), await site.front("ingress-2"), await site.engine("unified-1", "unified")
    running = asyncio.create_task(front.complete(max_tokens=100))
    await eventually(lambda: host.status().num_running == 1)
    (answer_id,) = front.store._open
    for ingress in (front, other):
        message = (await ingress.get(f"/v1/requests/{answer_id}/timeline")).json()["error"]["message"]
        assert "still running" in message
    await running
    with monkeypatch.context() as flooded:
        flooded.setattr(timeline_calls, "MAX_OPEN_QUERIES", 0)
        refused = await other.get("/v1/requests/cmpl-none/timeline")
    assert refused.status_code == 503 and refused.headers["Retry-After"]
    monkeypatch.setattr(front.client._timelines, "answer", lambda query: query)  # says nothing that is an answer
    message = (await other.get("/v1/requests/cmpl-none/timeline")).json()["error"]["message"]
    assert "ingress-1 did not answer" in message
