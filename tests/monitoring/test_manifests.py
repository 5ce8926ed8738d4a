"""What is applied to Kubernetes is what the Prometheus operator takes, and gives metrics the names of the table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from atom_cluster.gang.ray_metrics import OBSERVED
from atom_cluster.observability.metrics import ALL_METRICS
from tests.monitoring.promql import MONITORING, promtool

SCHEMAS: dict[str, Any] = json.loads((Path(__file__).parent / "schemas" / "prometheus_operator.json").read_text())
MONITORS = ("servicemonitor.yaml", "podmonitor.yaml")


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((MONITORING / name).read_text())
    return found


def endpoint(name: str) -> dict[str, Any]:
    spec = load(name)["spec"]
    (found,) = spec.get("endpoints") or spec["podMetricsEndpoints"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", [*MONITORS, "rules.yaml"])
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


def test_heads_and_workers_are_scraped_alike_and_each_once() -> None:
    service, pod = map(endpoint, MONITORS)
    assert service == pod
    selected = [load(name)["spec"]["selector"]["matchLabels"]["ray.io/node-type"] for name in MONITORS]
    assert sorted(selected) == ["head", "worker"]


def relabelled(name: str, rules: list[dict[str, Any]]) -> str | None:
    """What becomes of a metric's name; None: it is dropped."""
    for rule in rules:
        match = re.fullmatch(rule["regex"], name)
        if rule["action"] == "drop" and match:
            return None
        if rule["action"] == "replace" and match:
            name = match.expand(rule["replacement"].replace("${1}", r"\1"))
    return name


def test_what_ray_exports_gets_the_names_of_the_table() -> None:
    rules = endpoint(MONITORS[0])["metricRelabelings"]
    for metric in ALL_METRICS:
        if metric.kind == "histogram":
            exported = {f"ray_{metric.name}{suffix}" for suffix in ("_bucket", "_count", "_sum", f"{OBSERVED}_total")}
            wanted = {f"{metric.name}{suffix}" for suffix in ("_bucket", "_count", "_sum")}
            assert {relabelled(name, rules) for name in exported} - {None} == wanted
            assert relabelled(f"ray_{metric.name}_sum", rules) is None, "Ray's sum is wrong"
        else:
            assert relabelled(f"ray_{metric.name}", rules) == metric.name
    assert relabelled("ray_node_cpu_count", rules) == "ray_node_cpu_count"


def test_prometheus_takes_the_configuration_without_kubernetes() -> None:
    promtool("check", "config", "--syntax-only", MONITORING / "prometheus.yml")


def test_pods_of_our_clusters_have_the_port_that_is_scraped() -> None:
    port = endpoint(MONITORS[0])["port"]
    services = list(MONITORING.parent.glob("*/rayservice.yaml"))
    assert services
    for path in services:
        config = yaml.safe_load(path.read_text())["spec"]["rayClusterConfig"]
        for group in (config["headGroupSpec"], *config.get("workerGroupSpecs", ())):
            (container, *_) = group["template"]["spec"]["containers"]
            assert port in {entry.get("name") for entry in container.get("ports", ())}, f"{path}: {container['name']}"
