"""What a process runs and what it takes, for the metrics that each of ours exports. Of Linux; elsewhere nothing."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path

import atom_cluster
from atom_cluster.observability.metrics import PROCESS_CPU_S, PROCESS_OPEN_FILES, PROCESS_RESIDENT, MetricSink

_STATUS = Path("/proc/self/status")
_FILES = "/proc/self/fd"


def build_labels(model: str) -> dict[str, str]:
    """Labels of `BUILD_INFO`."""
    return {"version": atom_cluster.__version__, "python": platform.python_version(), "model": model[:120]}


class ProcessMeter:
    """Records this process's memory, processor time and open files, whenever it is asked to."""

    def __init__(self) -> None:
        self._cpu_s = 0.0

    def record(self, metrics: MetricSink) -> None:
        """Processor time counts from the process's start on."""
        cpu_s = time.process_time()
        metrics.inc(PROCESS_CPU_S, cpu_s - self._cpu_s)
        self._cpu_s = cpu_s
        # A process that has no file left to open cannot look, but goes on, and with it all its metrics.
        with contextlib.suppress(OSError):
            metrics.set(PROCESS_RESIDENT, resident_bytes())
            metrics.set(PROCESS_OPEN_FILES, len(os.listdir(_FILES)))


def resident_bytes() -> int:
    """Resident memory of this process."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    return 0
