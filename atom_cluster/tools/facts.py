"""Where and with what something was measured: for records of results. Knows nothing of what is measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def git_commit() -> str:
    """Of the checkout that this package is in, with `-dirty` when it has changes; `unknown` if it is in none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> dict[str, Any]:
    """Processors of this machine; GPUs if this process uses torch."""
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
