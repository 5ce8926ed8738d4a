"""Engines that draft put out what engines without do, for every kind of model that has layers for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from atom_cluster import LLMEngine
from atom_cluster.config.speculative import SpeculativeConfig
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import KV_TRANSFER_BYTES, PREEMPTIONS
from tests.equivalence.generation import mixed_requests
from tests.equivalence.test_prefill_decode import Pair
from tests.models import test_deepseek_draft, test_hybrid_draft, test_mimo_v2, test_mtp

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "deepseek_v3": lambda base: test_deepseek_draft.checkpoint_with_draft_layer("deepseek_v3", base),
    "deepseek_v32": lambda base: test_deepseek_draft.checkpoint_with_draft_layer("deepseek_v32", base),
    "glm_moe_dsa": lambda base: test_deepseek_draft.checkpoint_with_draft_layer("glm_moe_dsa", base),
    "qwen3_next": lambda base: test_hybrid_draft.checkpoint_with_draft_layer("qwen3_next", base),
    "qwen3_5": lambda base: test_hybrid_draft.checkpoint_with_draft_layer("qwen3_5", base),
    "qwen3_5_moe_vision": lambda base: test_hybrid_draft.checkpoint_with_draft_layer("qwen3_5_moe_vision", base),
    "glm4_moe, two layers": test_mtp.checkpoint_with_draft_layers,
    "mimo_v2, three layers": test_mimo_v2.hub_checkpoint,
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CHECKPOINTS[request.param](tmp_path_factory.getbasetemp())


def generate(directory: Path, *, num_tokens: int = 0, **options: object) -> list[list[int]]:
    """Output of the mixed requests, with so many drafts after each token."""
    settings: dict[str, object] = {
        "dtype": "float64",
        "device": "cpu",
        "block_size": 8,
        "num_blocks": 128,
        "max_num_requests": 16,
        "max_model_len": 112,
        "num_threads": 1,
        "speculative": SpeculativeConfig(method="mtp", num_tokens=num_tokens) if num_tokens else None,
        **options,
    }
    with LLMEngine(directory, **settings) as engine:  # type: ignore[arg-type]
        requests = mixed_requests()
        outputs = engine.generate([prompt for prompt, _ in requests], [sampling for _, sampling in requests])
    return [output["token_ids"] for output in outputs]


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
