"""The equalities once more on the real model, in the float32 that clusters use. Ids must be equal, ties included."""

from __future__ import annotations

from pathlib import Path

import pytest

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import PREEMPTIONS
from tests.equivalence.generation import Request

pytestmark = pytest.mark.demo_model

TOPICS = ("the sea", "a clock that ran backwards", "bread", "prime numbers", "the last train home", "rust")


def requests() -> list[Request]:
    """Prompts with a common beginning; greedy and seeded sampling in turn."""
    sampled = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=16, ignore_eos=True)
    result: list[Request] = []
    with_common_start = "You are a careful writer. Write one plain paragraph, without a title, about "
    for seed, topic in enumerate(TOPICS):
        params = SamplingParams(
            temperature=0.0 if seed % 2 else sampled.temperature, seed=seed, max_tokens=16, ignore_eos=True
        )
        result.append(([*(with_common_start + topic).encode()], params))
    return result


def run(demo_model: Path, *, rounds: int = 1, one_by_one: bool = False, **options: object) -> list[list[int]]:
    """Output ids of the last round. Bytes of the prompts serve as token ids: real weights, any text."""
    settings: dict[str, object] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "num_blocks": 256, **options}
    with LLMEngine(demo_model, **settings) as engine:  # type: ignore[arg-type]
        groups = [[request] for request in requests()] if one_by_one else [requests()]
        outputs: list[list[int]] = []
        for _ in range(rounds):
            outputs = []
            for group in groups:
                answers = engine.generate([prompt for prompt, _ in group], [params for _, params in group])
                outputs.extend(answer["token_ids"] for answer in answers)
    return outputs


@pytest.fixture(scope="module")
def expected(demo_model: Path) -> list[list[int]]:
    """Each request alone, whole, cold, undisturbed."""
    return run(demo_model, one_by_one=True, prefix_caching=False)


def test_a_batch_equals_its_requests_alone(demo_model: Path, expected: list[list[int]]) -> None:
    assert run(demo_model, prefix_caching=False) == expected


def test_chunks_equal_the_whole(demo_model: Path, expected: list[list[int]]) -> None:
    assert run(demo_model, prefix_caching=False, max_num_batched_tokens=24) == expected


def test_a_prefix_hit_equals_a_cold_run(demo_model: Path, expected: list[list[int]]) -> None:
    assert run(demo_model, rounds=2) == expected


def test_preempted_equals_undisturbed(demo_model: Path, expected: list[list[int]]) -> None:
    metrics = MemoryMetrics()
    assert run(demo_model, prefix_caching=False, num_blocks=20, max_model_len=256, metrics=metrics) == expected
    assert metrics.value(PREEMPTIONS) > 0
