"""Engines that draft put out what engines without do, for every kind of model that has layers for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from atom_cluster import LLMEngine, SamplingParams
from atom_cluster.config.speculative import SpeculativeConfig
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import KV_TRANSFER_BYTES, PREEMPTIONS, SPEC_DRAFT_TOKENS
from tests.draft_models import NUM_DRAFT_LAYERS, draft_model_dir
from tests.equivalence.generation import generate_drafting, mixed_requests
from tests.equivalence.pairs import Pair


@pytest.fixture(scope="module", params=NUM_DRAFT_LAYERS)
def directory(request: pytest.FixtureRequest) -> Path:
    return draft_model_dir(request.param)


def generate(directory: Path, *, num_tokens: int = 0, **options: object) -> list[list[int]]:
    """Output of the mixed requests, with so many drafts after each token."""
    return generate_drafting(directory, mixed_requests(), num_tokens=num_tokens, **options)


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[int]]:
    return generate(directory)


@pytest.mark.parametrize("num_tokens", [1, 3, 4])
def test_speculative_output_equals_plain_output(directory: Path, expected: list[list[int]], num_tokens: int) -> None:
    assert generate(directory, num_tokens=num_tokens) == expected


def test_so_it_does_in_chunks(directory: Path, expected: list[list[int]]) -> None:
    assert generate(directory, num_tokens=2, max_num_batched_tokens=11) == expected


def test_so_it_does_when_requests_are_preempted(directory: Path, expected: list[list[int]]) -> None:
    metrics = MemoryMetrics()
    assert generate(directory, num_tokens=2, num_blocks=16, metrics=metrics) == expected
    assert metrics.value(PREEMPTIONS) > 0


@pytest.mark.parametrize(("transport", "num_tokens"), [("shm", 2), ("tcp", 1), ("shm", 0)])
def test_so_do_prefill_and_decode_engines(
    directory: Path, expected: list[list[int]], transport: str, num_tokens: int
) -> None:
    pair = Pair(directory, transport=transport, num_drafts=num_tokens, max_model_len=112)
    try:
        assert pair.generate(mixed_requests()) == expected
        assert pair.metrics["decode"].value(KV_TRANSFER_BYTES) > 0
    finally:
        pair.close()


def test_an_engine_tells_how_many_drafts_were_kept(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = MemoryMetrics()
    speculative = SpeculativeConfig(method="mtp", num_tokens=2)
    options = {"device": "cpu", "num_blocks": 32, "num_threads": 1, "speculative": speculative, "metrics": metrics}
    with LLMEngine(draft_model_dir("glm4_moe"), **options) as engine:  # type: ignore[arg-type]
        prompt, _ = mixed_requests()[0]
        engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
        engine.print_mtp_statistics()
    num_drafted = metrics.value(SPEC_DRAFT_TOKENS, position="0")
    assert num_drafted > 10
    first = next(line for line in capsys.readouterr().out.splitlines() if "draft 1: " in line)
    assert first.endswith(f"of {num_drafted:.0f}")
