"""A small local Ray cluster for the tests that need one, shared by the session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    root = str(Path(__file__).parents[2])
    # Workers import the fakes of this folder.
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
        _system_config={"metrics_report_interval_ms": 1000},
    )
    yield
    ray.shutdown()
