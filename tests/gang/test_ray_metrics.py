"""Metrics recorded in a process of a Ray cluster appear on the node's metrics port."""

from __future__ import annotations

import time
import urllib.request
from typing import ClassVar

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from atom_cluster.gang import ray_metrics
from atom_cluster.gang.ray_metrics import RayMetrics
from atom_cluster.observability.metrics import ITL_S, KV_BLOCKS, PREEMPTIONS, REQUESTS_FINISHED, STEP_S

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@ray.remote(num_cpus=0.01)
class Recorder:
    def record(self) -> None:
        metrics = RayMetrics(labels={"replica": "r1", "role": "decode"}, period_s=0.1)
        metrics.inc(PREEMPTIONS, cause="admission")
        metrics.inc(REQUESTS_FINISHED, 0.0, reason="abort")
        metrics.inc(REQUESTS_FINISHED, reason="stop")
        metrics.inc(REQUESTS_FINISHED, 2.0, reason="stop")
        metrics.set(KV_BLOCKS, 3, state="free")
        metrics.set(KV_BLOCKS, 7, state="free")
        for seconds in (0.0002, 0.02, 0.02):
            metrics.observe(STEP_S, seconds, kind="decode")
        self.metrics = metrics

    def close(self) -> None:
        self.metrics.close()
        self.metrics.close()


def samples() -> dict[tuple[str, str], float]:
    """Value by (name, last label that matters) of this test's replica."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_atom_") and sample.labels.get("replica") == "r1":
                assert sample.labels["role"] == "decode"
                label = sample.labels.get("reason") or sample.labels.get("state") or sample.labels.get("le") or ""
                found[sample.name, label] = sample.value
    return found


def test_labels_that_are_not_the_metrics_are_an_error_where_they_are_recorded() -> None:
    metrics = RayMetrics(labels={}, period_s=60.0)
    for labels in ({}, {"raeson": "stop"}, {"reason": "stop", "more": "x"}):
        with pytest.raises(ValueError, match="atom_requests_finished_total has the labels"):
            metrics.inc(REQUESTS_FINISHED, **labels)
    metrics.close()


class Recorded:
    """In the place of Ray's gauges and counters: how often they were called, and what gauges are last."""

    num_calls = 0
    values: ClassVar[dict[tuple[str, str], float]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._name = name

    def set_default_tags(self, tags: dict[str, str]) -> None:
        pass

    def set(self, value: float, tags: dict[str, str]) -> None:
        Recorded.num_calls += 1
        Recorded.values[self._name, tags.get("le", "")] = value


def test_what_ray_is_told_does_not_grow_with_what_is_recorded_and_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_metrics.ray_metrics, "Gauge", Recorded)
    num_calls = []
    for num_observations in (1, 5000):
        monkeypatch.setattr(Recorded, "num_calls", 0)
        metrics = RayMetrics(labels={}, period_s=60.0, collect=lambda sink: None)
        for number in range(num_observations):
            metrics.observe(ITL_S, number * 1e-4)
        metrics.close()
        num_calls.append(Recorded.num_calls)
    assert num_calls[0] == num_calls[1] == len(ITL_S.buckets) + 3
    values = {key: value for (name, key), value in Recorded.values.items() if name == f"{ITL_S.name}_bucket"}
    assert (values["0.001"], values["0.1"], values["+Inf"]) == (11, 1001, 5000), "bounds belong to their buckets"
    assert Recorded.values[f"{ITL_S.name}_count", ""] == 5000
    assert Recorded.values[f"{ITL_S.name}_sum", ""] == pytest.approx(sum(range(5000)) * 1e-4)


def test_recordings_appear_on_rays_metrics_port() -> None:
    recorder = Recorder.remote()
    ray.get(recorder.record.remote())
    expected = {
        ("ray_atom_preemptions_total", ""): 1.0,
        ("ray_atom_requests_finished_total", "stop"): 3.0,
        ("ray_atom_kv_blocks", "free"): 7.0,
        ("ray_atom_step_seconds_bucket", "0.01"): 1.0,
        ("ray_atom_step_seconds_bucket", "0.025"): 3.0,
        ("ray_atom_step_seconds_bucket", "0.0001"): 0.0,
        ("ray_atom_step_seconds_bucket", "+Inf"): 3.0,
        ("ray_atom_step_seconds_count", ""): 3.0,
        ("ray_atom_step_seconds_sum", ""): pytest.approx(0.0402),
    }
    deadline_s = time.monotonic() + 30
    while True:
        found = samples()
        relevant = {key: found.get(key) for key in expected}
        if relevant == expected:
            break
        assert time.monotonic() < deadline_s, found
        time.sleep(0.5)
    assert found["ray_atom_process_resident_bytes", ""] > 2**20, "what a process takes is recorded by itself"
    ray.get(recorder.close.remote())
