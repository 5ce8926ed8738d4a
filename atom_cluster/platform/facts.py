"""PlatformFacts of the machine this process runs on. Knows nothing of other machines of a cluster."""

from __future__ import annotations

import os
from pathlib import Path

from atom_cluster.config.facts import PlatformFacts
from atom_cluster.platform.detect import detect_platform

_CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def local_platform_facts(*, is_single_host: bool = False) -> PlatformFacts:
    """What this machine has. Only the caller can know whether it will be the only one of the cluster."""
    platform = detect_platform()
    return PlatformFacts(
        vendor=platform.vendor,
        num_gpus=0 if platform.vendor == "cpu" else platform.num_devices,
        num_cores=usable_cores(),
        is_single_host=is_single_host,
    )


def usable_cores(cgroup_cpu_limit: Path = _CGROUP_CPU_LIMIT) -> int:
    """CPU cores that this process may use: its affinity, and the quota of its container. At least 1."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup_cpu_limit.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return num_cores
    return num_cores if quota == "max" else max(1, min(num_cores, int(quota) // int(period)))
