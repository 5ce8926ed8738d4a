"""What needs no accelerator and no cluster imports without torch and Ray, so that it starts and tests fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "ray", "transformers")

LIGHT_MODULES = [
    "atom_cluster",
    "atom_cluster.errors",
    "atom_cluster.messages.cluster",
    "atom_cluster.messages.requests",
    "atom_cluster.messages.steps",
    "atom_cluster.messages.transfer",
    "atom_cluster.config.load",
    "atom_cluster.config.resolve",
    "atom_cluster.config.model_path",
    "atom_cluster.kv_cache",
    "atom_cluster.routing",
    "atom_cluster.link.endpoint",
    "atom_cluster.engine.core",
    "atom_cluster.api.routes",
    "atom_cluster.observability.metrics",
    "atom_cluster.tools.__main__",
]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_import_no_heavy_library(module: str, repo_root: Path) -> None:
    # `kv_cache` and `routing` are packages: all of their modules are light.
    code = f"""
import importlib, pkgutil, sys
module = importlib.import_module({module!r})
if {module!r} in ("atom_cluster.kv_cache", "atom_cluster.routing"):
    for info in pkgutil.iter_modules(module.__path__, {module!r} + "."):
        importlib.import_module(info.name)
print(*sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
