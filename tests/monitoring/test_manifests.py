"""What is applied to Kubernetes is what the Prometheus operator takes, and gives metrics the names of the table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from atom_cluster.observability.metrics import ALL_METRICS
from tests.monitoring.promql import MONITORING, promtool

SCHEMAS: dict[str, Any] = json.loads((Path(__file__).parent / "schemas" / "prometheus_operator.json").read_text())


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((MONITORING / name).read_text())
    return found


def endpoint() -> dict[str, Any]:
    (found,) = load("podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", ["podmonitor.yaml", "rules.yaml"])
def test_the_operator_takes_it(name: str) -> None:
    manifest = load(name)
    schema = SCHEMAS["schemas"][f"{manifest['apiVersion']}/{manifest['kind']}"]
    jsonschema.validate(manifest, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**manifest, "spec": {**manifest["spec"], "endpiont": 1}}, schema)


def test_kustomize_finds_what_it_names_and_forgets_nothing() -> None:
    kustomization = load("kustomization.yaml")
    dashboards = kustomization["configMapGenerator"][0]["files"]
    assert all((MONITORING / name).is_file() for name in (*kustomization["resources"], *dashboards))
    applied = {path.name for path in MONITORING.glob("*.yaml")} - {"kustomization.yaml", "rules_test.yaml"}
    assert set(kustomization["resources"]) == applied


def test_heads_and_workers_are_scraped_and_each_once() -> None:
    """By pods: of the head of a RayService there are two services with the same labels."""
    assert [path.name for path in MONITORING.glob("*monitor.yaml")] == ["podmonitor.yaml"]
    (expression,) = load("podmonitor.yaml")["spec"]["selector"]["matchExpressions"]
    assert (expression["key"], expression["operator"]) == ("ray.io/node-type", "In")
    assert sorted(expression["values"]) == ["head", "worker"]


def relabelled(name: str, rules: list[dict[str, Any]]) -> str:
    """What becomes of a metric's name."""
    for rule in rules:
        match = re.fullmatch(rule["regex"], name)
        if rule["action"] == "replace" and match:
            name = match.expand(rule["replacement"].replace("${1}", r"\1"))
    return name


def test_what_ray_exports_gets_the_names_of_the_table() -> None:
    rules = endpoint()["metricRelabelings"]
    for metric in ALL_METRICS:
        if metric.kind == "histogram":
            for suffix in ("_bucket", "_count", "_sum"):
                assert relabelled(f"ray_{metric.name}{suffix}", rules) == f"{metric.name}{suffix}"
        else:
            assert relabelled(f"ray_{metric.name}", rules) == metric.name
    assert relabelled("ray_node_cpu_count", rules) == "ray_node_cpu_count"


def test_prometheus_takes_the_configuration_without_kubernetes() -> None:
    promtool("check", "config", "--syntax-only", MONITORING / "prometheus.yml")


def test_pods_of_our_clusters_have_the_port_that_is_scraped() -> None:
    port = endpoint()["port"]
    services = list(MONITORING.parent.glob("*/rayservice.yaml"))
    assert services
    for path in services:
        config = yaml.safe_load(path.read_text())["spec"]["rayClusterConfig"]
        for group in (config["headGroupSpec"], *config.get("workerGroupSpecs", ())):
            (container, *_) = group["template"]["spec"]["containers"]
            assert port in {entry.get("name") for entry in container.get("ports", ())}, f"{path}: {container['name']}"
