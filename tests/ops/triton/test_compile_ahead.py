"""What is compiled ahead is not run, is there when it is launched, and leaves its errors to the launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def starts(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, which share a cache on disk."""
    cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | cache
    command = [sys.executable, "-m", "tests.ops.triton.compile_ahead_of_nothing"]
    found = []
    for _ in range(2):
        done = subprocess.run(command, cwd=repo_root, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def test_launches_compute_nothing_and_indices_are_some(starts: list[dict[str, Any]]) -> None:
    assert starts[0]["launched_here"] == []
    assert starts[0]["x"] == [5.0]
    assert starts[0]["empties"] == [0.0]


def test_other_threads_launch_as_ever(starts: list[dict[str, Any]]) -> None:
    assert starts[0]["launched"][0] == "_negate"


def test_each_variant_is_compiled_once_and_there_when_it_is_launched(starts: list[dict[str, Any]]) -> None:
    first = starts[0]
    assert first["num_kernels"] == 4
    assert first["num_compiled"] == 4  # that of the other thread, and not the impossible one
    assert first["compiled_later"] == []


def test_what_cannot_be_compiled_is_told_where_it_is_launched(starts: list[dict[str, Any]]) -> None:
    assert "sizes are never negative" in starts[0]["error"]


def test_an_error_between_launches_is_told_and_waits_for_nothing(starts: list[dict[str, Any]]) -> None:
    assert starts[0]["raised"] == "of the body"
    assert starts[0]["compiled_later"] == []


def test_a_second_process_compiles_none_of_it(starts: list[dict[str, Any]]) -> None:
    assert starts[1]["num_kernels"] == 4
    assert starts[1]["num_compiled"] == 0


def test_who_watched_compilations_does_so_again(starts: list[dict[str, Any]]) -> None:
    assert starts[0]["watched_again"] == ["_negate"]
