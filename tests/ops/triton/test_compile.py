"""Every kernel compiles for every chip that it is meant for, with the options that its launcher gives it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ops.triton.compile_kernels import CHIPS, all_launches

MAX_KEPT = 2000
"""Kernels that are kept between runs, three times as many as there are: those of earlier sources come behind."""
Report = dict[str, object]


@pytest.fixture(scope="module")
def compile_for(repo_root: Path) -> Iterator[Callable[[str, str], Report]]:
    """What compile_kernels reports of a launch and a chip. Triton finds what did not change since it was compiled."""
    kept = repo_root / ".pytest_cache" / "triton"
    kept.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another worker removes them, too
        for old in sorted(kept.iterdir(), key=lambda path: path.stat().st_mtime)[:-MAX_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    env = {**os.environ, "TRITON_CACHE_DIR": str(kept), "TRITON_STORE_BINARY_ONLY": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.ops.triton.compile_kernels", "--asked"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=repo_root, env=env, text=True, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(launch: str, chip: str) -> Report:
            print(json.dumps([launch, chip]), file=process.stdin, flush=True)
            report: Report = json.loads(process.stdout.readline())
            assert (report["launch"], report["chip"]) == (launch, chip)
            return report

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("launch", [name for name, _ in all_launches()])
def test_kernels_compile(compile_for: Callable[[str, str], Report], launch: str, chip: str) -> None:
    report = compile_for(launch, chip)
    assert report["error"] is None, report["error"]
    assert report["num_kernels"], "the launch launched no kernel"
