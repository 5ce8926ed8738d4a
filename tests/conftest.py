"""What all tests share: offline by default, and the demo model for those that need real weights."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports torch or huggingface_hub, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels read it when they are imported

import pytest

from atom_cluster.config.model_path import demo_model_dir


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `demo_model` while the model has not been fetched."""
    directory = demo_model_dir()
    if directory.is_dir():
        return
    reason = f"no demo model in {directory}: run `atom-cluster get-demo-model`"
    for item in items:
        if item.get_closest_marker("demo_model"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The directory that holds pyproject.toml."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Directory of the demo model; a test that uses it carries the `demo_model` mark, which skips it when absent."""
    return demo_model_dir()
