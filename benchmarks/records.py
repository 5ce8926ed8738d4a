"""Results on disk: what was measured, and everything needed to repeat and compare it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS_DIR = Path(__file__).parent / "results"


def save_record(benchmark: str, label: str, details: dict[str, Any], *, arguments: Sequence[str] | None = None) -> Path:
    """Write `results/<benchmark>_<label>_<time>.json`; the folder is `ATOM_BENCHMARK_RESULTS` if that is set.

    arguments: of the benchmark's command; None: those of this process.
    """
    now = time.gmtime()
    record = {
        "benchmark": benchmark,
        "command": f"python -m benchmarks.{benchmark} {shlex.join(sys.argv[1:] if arguments is None else arguments)}",
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", now),
        "hardware": hardware(),
        "software": software(),
        **details,
    }
    directory = Path(os.environ.get("ATOM_BENCHMARK_RESULTS", RESULTS_DIR))
    directory.mkdir(parents=True, exist_ok=True)
    parts = [benchmark.replace(".", "_"), *([label] if label else []), time.strftime("%Y%m%d_%H%M%S", now)]
    path = directory / f"{'_'.join(parts)}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def commit() -> str:
    """Of the working tree, with `-dirty` when it has changes; for a copy with another history, `ATOM_COMMIT` tells."""
    if given := os.environ.get("ATOM_COMMIT"):
        return given
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


def hardware() -> dict[str, Any]:
    """Processors of this machine; GPUs if the benchmark uses torch."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def software() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "triton", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def cpu_name() -> str:
    """Model name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
