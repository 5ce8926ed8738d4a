"""What all threads of a program stored is on its way no more when one of them tells other programs, on AMD chips too.

Read off the instructions: nothing here runs on such a chip, and there it would show once in a long while.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
import torch, triton
from triton.runtime.jit import JITFunction
from atom_cluster.ops.triton.gemm import GemmBlocks, gemm
from tests.ops.triton.compile_kernels import CHIPS, AbsentDriver
from tests.ops.triton.launches.peer_all_reduce import reduce

found = {}
run = JITFunction.run

def compile_only(self, *args, grid, warmup=False, **options):
    found[self.fn.__name__] = run(self, *args, grid=grid, warmup=True, **options).asm["amdgcn"].splitlines()

JITFunction.run = compile_only
triton.runtime.driver.set_active(AbsentDriver(CHIPS[sys.argv[1]]))
x, weight, out = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((4, 4096), (256, 4096), (4, 256)))
blocks = GemmBlocks(outputs=64, tokens=16, inputs=128, splits=8, num_stages=2)
gemm(x, weight, None, out, torch.zeros(32, dtype=torch.int32), blocks)
reduce(2, 1)
print(json.dumps(found))
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("chip", ["gfx942", "gfx950"])
def test_stores_are_waited_for_before_the_barrier(repo_root: Path, tmp_path: Path, chip: str) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROGRAM, chip]
    report = subprocess.run(command, cwd=repo_root, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    kernels: dict[str, list[str]] = json.loads(report)
    assert len(kernels) == 2
    for name, lines in kernels.items():
        told = next(i for i, line in enumerate(lines) if "_atomic_" in line)
        stored = max(i for i, line in enumerate(lines[:told]) if "_store_" in line)
        barrier = next(i for i, line in enumerate(lines) if i > stored and "s_barrier" in line)
        assert barrier < told, name
        assert any("s_waitcnt vmcnt(0)" in line for line in lines[stored:barrier]), name
