"""One disaggregated cluster serves all end-to-end tests; each test leaves it healthy and idle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import REPO, RunningCluster, serve_run, with_args


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """`serve run configs/smollm2_cpu.yaml`, on another port and with limits that tests can reach."""
    directory: Path = tmp_path_factory.mktemp("cluster")
    config = with_args(
        REPO / "configs" / "smollm2_cpu.yaml",
        directory / "cluster.yaml",
        scheduler={"max_waiting_requests": 128, "max_num_requests": 64},
        api={
            "max_body_bytes": 4 * 1024 * 1024,
            "body_timeout_s": 6.0,
            # The checkpoint's own knows no tools, and clients could not ask for any.
            "chat_template": str(Path(__file__).with_name("smollm2_tools.jinja")),
        },
        # All prompts of any length go to prefill, so that tests know what they test.
        kv_transfer={"conditional_prefill": False},
        # Less than answers take, so that some of them move when their replica is stopped.
        serving={"drain_timeout_s": 1.0},
        observability={"profile": {"directory": str(directory / "traces")}, "log_format": "json"},
    )
    with serve_run(config, directory) as running:
        yield running
