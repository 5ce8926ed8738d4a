"""Results on disk: what was measured, and everything needed to repeat and compare it."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atom_cluster.tools.facts import git_commit, hardware, software

RESULTS_DIR = Path(__file__).parent / "results"


def save_record(
    benchmark: str,
    label: str,
    details: dict[str, Any],
    *,
    arguments: Sequence[str] | None = None,
    path: Path | None = None,
) -> Path:
    """Write `results/<benchmark>_<label>_<time>.json`; the folder is `ATOM_BENCHMARK_RESULTS` if that is set.

    arguments: of the benchmark's command; None: those of this process. path: what an earlier call of the same run
    returned, to write that file again.
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
    path = path or directory / f"{'_'.join(parts)}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def commit() -> str:
    """Of the working tree; for a copy with another history, `ATOM_COMMIT` tells."""
    return os.environ.get("ATOM_COMMIT") or git_commit()
