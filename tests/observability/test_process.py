"""What a process records of itself is what the system says."""

from __future__ import annotations

import mmap
import os
import platform

import pytest

import atom_cluster
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import BUILD_INFO, PROCESS_CPU_S, PROCESS_OPEN_FILES, PROCESS_RESIDENT
from atom_cluster.observability.process import ProcessMeter, build_labels


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_memory_files_and_processor_time_follow_the_process() -> None:
    metrics, meter = MemoryMetrics(), ProcessMeter()
    meter.record(metrics)
    before = {metric: metrics.value(metric) for metric in (PROCESS_RESIDENT, PROCESS_OPEN_FILES, PROCESS_CPU_S)}
    # Pages of its own: what a long run has freed would be given out again, and nothing grow.
    with mmap.mmap(-1, 256 * 2**20) as block, open(os.devnull) as _:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        meter.record(metrics)
        assert metrics.value(PROCESS_RESIDENT) - before[PROCESS_RESIDENT] > 0.5 * len(block)
    assert metrics.value(PROCESS_OPEN_FILES) == before[PROCESS_OPEN_FILES] + 1
    assert metrics.value(PROCESS_CPU_S) > before[PROCESS_CPU_S] > 0


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_a_process_that_can_open_no_more_files_is_measured_as_far_as_that_goes() -> None:
    resource = pytest.importorskip("resource")
    metrics, meter = MemoryMetrics(), ProcessMeter()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        meter.record(metrics)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert metrics.value(PROCESS_CPU_S) > 0
    meter.record(metrics)
    assert metrics.value(PROCESS_OPEN_FILES) > 0


def test_a_build_is_known_by_bounded_labels() -> None:
    metrics = MemoryMetrics()
    metrics.set(BUILD_INFO, 1, **build_labels("m" * 1000))
    ((version, python, model),) = metrics.series(BUILD_INFO)
    assert (version, python) == (atom_cluster.__version__, platform.python_version())
    assert len(model) == 120
