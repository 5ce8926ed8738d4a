from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atom_cluster.platform.facts import local_platform_facts, usable_cores


@pytest.mark.parametrize(
    ("limit", "expected"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("?", 4)]
)
def test_usable_cores_respect_the_quota_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert usable_cores(tmp_path / "cpu.max") == expected


def test_without_a_container_all_usable_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert usable_cores(tmp_path / "absent") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has GPUs")
def test_a_machine_without_gpus_says_so() -> None:
    facts = local_platform_facts(is_single_host=True)
    assert (facts.vendor, facts.num_gpus, facts.is_single_host) == ("cpu", 0, True)
    assert facts.num_cores >= 1
