"""Engines on a CUDA or ROCm device put out what engines on a CPU do: plain, drafting, and in pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import KV_TRANSFER_BYTES, SPEC_ACCEPTED_TOKENS, SPEC_DRAFT_TOKENS
from tests.draft_models import NUM_DRAFT_LAYERS, draft_model_dir
from tests.equivalence import test_speculation, test_tensor_parallel
from tests.equivalence.generation import FAMILIES, generate, mixed_requests
from tests.equivalence.pairs import Pair
from tests.tiny_models import tiny_model_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

SPECULATION = (SPEC_DRAFT_TOKENS, SPEC_ACCEPTED_TOKENS)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_device_gives_what_a_cpu_does(name: str) -> None:
    expected = generate(name, mixed_requests())
    assert generate(name, mixed_requests(), device="cuda") == expected
    assert generate(name, mixed_requests(), device="cuda", max_num_batched_tokens=20) == expected
    pair = Pair(tiny_model_dir(name), transport="tcp", device="cuda")
    try:
        assert pair.generate(mixed_requests(), timeout_s=120.0) == expected
        assert pair.metrics["decode"].value(KV_TRANSFER_BYTES) > 0
    finally:
        pair.close()


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_runs_whatever_caches_hold(name: str, kv_dtype: str) -> None:
    requests = mixed_requests()
    found = generate(name, requests, device="cuda", dtype="bfloat16", kv_dtype=kv_dtype)
    assert [len(tokens) for tokens, (_, s) in zip(found, requests) if s.ignore_eos] == [
        s.max_tokens for _, s in requests if s.ignore_eos
    ]


@pytest.fixture(scope="module", params=NUM_DRAFT_LAYERS)
def directory(request: pytest.FixtureRequest) -> Path:
    return draft_model_dir(request.param)


@pytest.mark.parametrize("num_tokens", [2, 4])
def test_a_device_drafts_and_keeps_what_a_cpu_does(directory: Path, num_tokens: int) -> None:
    expected = test_speculation.generate(directory)
    counts = []
    for device in ("cpu", "cuda"):
        metrics = MemoryMetrics()
        found = test_speculation.generate(directory, num_tokens=num_tokens, device=device, metrics=metrics)
        assert found == expected
        counts.append([metrics.value(m, position=str(i)) for m in SPECULATION for i in range(num_tokens)])
    assert counts[0] == counts[1]
    assert counts[0][num_tokens] > 0, "no draft was kept"


def test_pairs_on_a_device_draft_too(directory: Path) -> None:
    pair = Pair(directory, transport="tcp", num_drafts=2, max_model_len=112, device="cuda")
    try:
        assert pair.generate(mixed_requests(), timeout_s=120.0) == test_speculation.generate(directory)
    finally:
        pair.close()


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two devices")
@pytest.mark.parametrize("num_drafts", [0, 3])
def test_two_devices_draft_and_verify_as_one_does(directory: Path, num_drafts: int, tmp_path: Path) -> None:
    model = test_tensor_parallel.Model(directory, "float64", num_drafts=num_drafts, device="cuda")
    test_tensor_parallel.assert_split_equals_whole(model, 2, tmp_path / "meeting_point")
