"""Every kernel compiles for every chip that it is meant for, with the options that its launcher gives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.triton.compile_kernels import CHIPS, all_launches

NUM_PROCESSES = 2


@pytest.fixture(scope="module")
def compiled(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, object]]:
    """What compile_kernels reports, by launch and chip."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("kernels"))}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.ops.triton.compile_kernels", "--part"]
    processes = [
        subprocess.Popen([*command, f"{i}/{NUM_PROCESSES}"], cwd=repo_root, env=env, stdout=subprocess.PIPE, text=True)
        for i in range(NUM_PROCESSES)
    ]
    lines = [line for process in processes for line in process.communicate()[0].splitlines()]
    reports = [json.loads(line) for line in lines]
    return {(report["launch"], report["chip"]): report for report in reports}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("launch", [name for name, _ in all_launches()])
def test_kernels_compile(compiled: dict[tuple[str, str], dict[str, object]], launch: str, chip: str) -> None:
    report = compiled[launch, chip]
    assert report["error"] is None, report["error"]
    assert report["num_kernels"], "the launch launched no kernel"
