"""The application is scaled and deployed anew under load. No answer is lost, wrong or broken off, and nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.e2e.cluster import RunningCluster
from tests.e2e.deploy import serve_deploy
from tests.e2e.test_faults import Load

pytestmark = [pytest.mark.ray, pytest.mark.demo_model]

Change = Callable[[dict[str, Any]], None]


def deploy(cluster: RunningCluster, change: Change) -> None:
    """`serve deploy` the file that the cluster was started with, with one change to its application."""
    assert cluster.log is not None
    directory = cluster.log.parent
    document = yaml.safe_load((directory / "cluster.yaml").read_text())
    change(document["applications"][0])
    changed = directory / "changed.yaml"
    changed.write_text(yaml.safe_dump(document))
    serve_deploy(cluster.ray_address, changed)


def pids(cluster: RunningCluster, role: str) -> set[int]:
    return {replica["pid"] for replica in cluster.replicas() if replica["role"] == role}


def with_decode_replicas(count: int) -> Change:
    def change(application: dict[str, Any]) -> None:
        application["deployments"] = [{"name": "Decode", "num_replicas": count}]

    return change


def with_everything_replaced(application: dict[str, Any]) -> None:
    """Other arguments are another version of every deployment."""
    application["args"]["serving"] = {"drain_timeout_s": 1.5}


def test_scaling_down_loses_nothing(cluster: RunningCluster) -> None:
    deploy(cluster, with_decode_replicas(2))
    cluster.wait_until(lambda: len(pids(cluster, "decode")) == 2, what="two decode replicas", timeout_s=90)
    load = Load(cluster)

    def scale_down() -> None:
        deploy(cluster, with_decode_replicas(1))
        cluster.wait_until(lambda: len(pids(cluster, "decode")) == 1, what="one decode replica", timeout_s=90)

    load.run_while(scale_down)
    assert load.wrong == [] and load.errors == []
    cluster.wait_until_idle()


def test_deploying_anew_loses_nothing(cluster: RunningCluster) -> None:
    load = Load(cluster)
    before = {role: pids(cluster, role) for role in ("prefill", "decode")}

    def redeploy() -> None:
        deploy(cluster, with_everything_replaced)
        for role, old in before.items():
            cluster.wait_until(
                lambda role=role, old=old: len(pids(cluster, role)) == 1 and not pids(cluster, role) & old,  # type: ignore[misc]
                what=f"another {role} replica",
                timeout_s=120,
            )

    load.run_while(redeploy)
    assert load.wrong == [] and load.errors == []
    cluster.wait_until_idle()
