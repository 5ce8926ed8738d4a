"""On a GPU: what is compiled before anything runs is all that the start, captures included, needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.draft_models import draft_model_dir
from tests.tiny_models import tiny_model_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

PROGRAM = """
import json, sys
import triton
from atom_cluster.runner import build
from atom_cluster.runner.options import RunnerOptions

late = []

def note(*, src, cache_hit, **_):
    if not cache_hit:
        late.append(src.name)

def compile_ahead(*args):
    choice = rehearse(*args)
    triton.knobs.compilation.listener = note
    return choice

rehearse, build._compile_ahead = build._compile_ahead, compile_ahead
runner = build.build_model_runner(RunnerOptions(**json.loads(sys.argv[1])))
print(json.dumps({"choice": runner.info.choices["kernels"], "parts": runner.info.start.parts_s, "late": late}))
"""


def start(repo_root: Path, cache: Path, model_dir: Path, num_drafts: int) -> dict[str, Any]:
    options = {
        "model_dir": str(model_dir),
        "device": "cuda",
        "dtype": "bfloat16",
        "max_num_requests": 40,
        "max_model_len": 500,
        "max_num_batched_tokens": 512,
        "num_blocks": 500,
        "num_drafts": num_drafts,
    }
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(options)]
    done = subprocess.run(command, cwd=repo_root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("model", "num_drafts"), [("llama", 0), ("qwen3_next", 0), ("deepseek_v3", 2)])
def test_a_start_compiles_nothing_behind_it(repo_root: Path, tmp_path: Path, model: str, num_drafts: int) -> None:
    model_dir = draft_model_dir(model) if num_drafts else tiny_model_dir(model, "bfloat16")
    cold = start(repo_root, tmp_path, model_dir, num_drafts)
    assert cold["late"] == []
    assert {"compile", "capture", "warm up"} <= set(cold["parts"])
    assert ", 0 of them compiled" not in cold["choice"]
    warm = start(repo_root, tmp_path, model_dir, num_drafts)
    assert ", 0 of them compiled" in warm["choice"]
