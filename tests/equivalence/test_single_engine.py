"""One engine, run in different ways, gives the same tokens."""

from __future__ import annotations

import pytest

from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import PREEMPTIONS
from tests.equivalence.generation import FAMILIES, generate, make_engine, mixed_requests


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(model: str) -> list[list[int]]:
    """Requests one after the other, nothing shared, nothing planned ahead."""
    return [generate(model, [request], prefix_caching=False, async_scheduling=False)[0] for request in mixed_requests()]


def test_a_batch_gives_what_its_requests_give_alone(model: str, expected: list[list[int]]) -> None:
    assert generate(model, mixed_requests()) == expected


def test_asynchronous_scheduling_equals_synchronous(model: str, expected: list[list[int]]) -> None:
    assert generate(model, mixed_requests(), async_scheduling=True) == expected
    assert generate(model, mixed_requests(), async_scheduling=False) == expected


@pytest.mark.parametrize("num_tokens", [8, 11, 32])
def test_chunked_prefill_equals_whole(model: str, expected: list[list[int]], num_tokens: int) -> None:
    assert generate(model, mixed_requests(), max_num_batched_tokens=num_tokens) == expected


def test_a_prefix_hit_equals_a_cold_run(model: str, expected: list[list[int]]) -> None:
    prompts = [prompt for prompt, _ in mixed_requests()]
    samplings = [sampling for _, sampling in mixed_requests()]
    with make_engine(model) as engine:
        cold = engine.generate(prompts, samplings)
        warm = engine.generate(prompts, samplings)
    assert [output["token_ids"] for output in cold] == expected
    assert [output["token_ids"] for output in warm] == expected
    # All full blocks of a prompt, but never its last token.
    assert [output["num_cached_tokens"] for output in warm] == [(len(prompt) - 1) // 8 * 8 for prompt in prompts]


def test_requests_with_a_common_prefix_share_it_within_a_batch(model: str) -> None:
    prefix = mixed_requests()[6][0]
    requests = [([*prefix, *tail], sampling) for tail, sampling in mixed_requests()[:4]]
    alone = [generate(model, [request], prefix_caching=False)[0] for request in requests]
    assert generate(model, requests, max_num_batched_tokens=40) == alone


def test_preempted_requests_go_on_as_if_undisturbed(model: str, expected: list[list[int]]) -> None:
    metrics = MemoryMetrics()
    with make_engine(model, num_blocks=13, metrics=metrics) as engine:
        requests = mixed_requests()
        outputs = engine.generate([prompt for prompt, _ in requests], [sampling for _, sampling in requests])
    assert metrics.value(PREEMPTIONS) > 0
    assert [output["token_ids"] for output in outputs] == expected
