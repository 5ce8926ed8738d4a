"""First tokens, gaps and rates are those of the writes, as a client at the other end would measure them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from atom_cluster.api.answers.answer_times import AnswerTimes
from atom_cluster.api.text.tokenizer import Tokenizer
from atom_cluster.observability.memory import Histogram, MemoryMetrics
from atom_cluster.observability.metrics import (
    HTTP_ERRORS,
    HTTP_ITL_S,
    HTTP_OUTPUT_TOKENS,
    HTTP_PROMPT_TOKENS,
    HTTP_REQUEST_S,
    HTTP_TPOT_S,
    HTTP_TTFT_S,
)
from tests.api.conftest import Api
from tests.fakes import VirtualClock

ROUTE = "/v1/completions"


@dataclass
class Counted:
    index: int = 0
    num_tokens: int = 0
    first_token_at_s: float | None = None
    last_token_at_s: float | None = None


@pytest.fixture
def hello(make_api: Callable[..., Api], tokenizer: Tokenizer) -> Api:
    return make_api(lambda request: [tuple(tokenizer.encode("Hello")), "stop"])


def spread(found: Histogram) -> tuple[int, float]:
    return found.count, round(found.sum, 6)


def test_a_stream_is_timed_by_its_writes() -> None:
    clock, metrics = VirtualClock(100.0), MemoryMetrics()
    outputs = [Counted(0), Counted(1)]
    times = AnswerTimes(outputs, route=ROUTE, arrived_at_s=99.0, metrics=metrics, clock=clock)
    times.write([])  # a piece without tokens
    clock.sleep(0.5)
    outputs[0].num_tokens = 1
    times.write(outputs[:1])
    clock.sleep(0.25)
    outputs[0].num_tokens, outputs[1].num_tokens = 4, 1
    times.write(outputs)
    clock.sleep(0.25)
    outputs[1].num_tokens = 2
    times.write(outputs[1:])
    clock.sleep(1.0)
    times.end(num_prompt_tokens=7)
    assert spread(metrics.histogram(HTTP_TTFT_S, route=ROUTE)) == (1, 1.5)
    assert spread(metrics.histogram(HTTP_ITL_S, route=ROUTE)) == (2, 0.5)
    assert spread(metrics.histogram(HTTP_TPOT_S, route=ROUTE)) == (2, round(0.25 / 3 + 0.25, 6))
    assert spread(metrics.histogram(HTTP_REQUEST_S, route=ROUTE)) == (1, 3.0)
    assert metrics.histogram(HTTP_PROMPT_TOKENS, route=ROUTE).sum == 7
    assert metrics.histogram(HTTP_OUTPUT_TOKENS, route=ROUTE).sum == 6


def test_a_write_looks_at_the_outputs_that_grew_and_at_no_other() -> None:
    class Untouchable(Counted):
        def __getattribute__(self, name: str) -> object:
            raise AssertionError(f"{name} of an output that has nothing new")

    clock, metrics = VirtualClock(), MemoryMetrics()
    outputs = [Counted(0), Untouchable(), Counted(2, num_tokens=1)]
    times = AnswerTimes(outputs, route=ROUTE, arrived_at_s=0.0, metrics=metrics, clock=clock)
    times.write(outputs[2:])
    clock.sleep(1.0)
    times.write(outputs[2:])
    assert spread(metrics.histogram(HTTP_ITL_S)) == (1, 1.0)


def test_a_whole_answer_is_timed_by_when_its_tokens_came() -> None:
    clock, metrics = VirtualClock(100.0), MemoryMetrics()
    output = Counted(0, 5, 101.0, 103.0)
    clock.sleep(4.0)
    AnswerTimes([output], route=ROUTE, arrived_at_s=100.0, metrics=metrics, clock=clock).end(num_prompt_tokens=3)
    assert spread(metrics.histogram(HTTP_TTFT_S, route=ROUTE)) == (1, 1.0)
    assert spread(metrics.histogram(HTTP_TPOT_S, route=ROUTE)) == (1, 0.5)
    assert metrics.histogram(HTTP_ITL_S, route=ROUTE).count == 0


def test_an_answer_without_a_token_has_a_duration_alone() -> None:
    metrics = MemoryMetrics()
    AnswerTimes([Counted()], route=ROUTE, arrived_at_s=0.0, metrics=metrics, clock=VirtualClock(2.0)).end(
        num_prompt_tokens=3
    )
    assert spread(metrics.histogram(HTTP_REQUEST_S)) == (1, 2.0)
    assert metrics.histogram(HTTP_TTFT_S).count == metrics.histogram(HTTP_OUTPUT_TOKENS).count == 0


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_requests_are_recorded_by_route(hello: Api, *, is_streamed: bool) -> None:
    async with hello.client() as client:
        await client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "stream": is_streamed})
    for metric in (HTTP_TTFT_S, HTTP_REQUEST_S, HTTP_PROMPT_TOKENS, HTTP_OUTPUT_TOKENS):
        assert hello.metrics.histogram(metric, route="/v1/completions").count == 1, metric.name
    assert hello.metrics.histogram(HTTP_TTFT_S).sum < 10


async def test_errors_are_counted_by_kind_and_those_of_clients_are_not_shown(hello: Api) -> None:
    async with hello.client() as client:
        await client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "n": 0})
        await client.post("/v1/completions", json={"model": "other", "prompt": "a"})
        page = (await client.get("/v1/cluster")).json()
    assert hello.metrics.value(HTTP_ERRORS) == 2
    assert hello.metrics.value(HTTP_ERRORS, kind="UnknownModel") == 1
    assert page["recent_errors"] == []
