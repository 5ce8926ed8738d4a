"""What a running cluster shows of itself: metrics of every process, means that are right, a status page."""

from __future__ import annotations

import json
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from atom_cluster.observability.metrics import ALL_METRICS
from tests.e2e.cluster import RunningCluster

pytestmark = [pytest.mark.ray, pytest.mark.demo_model]

PROMPT = "A prompt that is long enough to be computed by prefill, and read from there. " * 4
NUM_REQUESTS = 3


def stream(cluster: RunningCluster, prompt: str) -> float:
    """Seconds to the first event with text."""
    model = cluster.get("/v1/models")["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 8, "stream": True, "ignore_eos": True})
    headers = {"content-type": "application/json"}
    began_s, first_s = time.monotonic(), None
    with urllib.request.urlopen(urllib.request.Request(f"{cluster.url}/v1/completions", body.encode(), headers)) as got:
        for line in got:
            if line.startswith(b"data: {") and b'"text"' in line:
                first_s = first_s or time.monotonic()
    assert first_s is not None
    return first_s - began_s


def test_every_process_tells_what_it_does(cluster: RunningCluster) -> None:
    ttft = "atom_http_time_to_first_token_seconds"
    waited_s = [stream(cluster, f"{number} {PROMPT}") for number in range(NUM_REQUESTS)]
    cluster.wait_until(lambda: cluster.metric(ttft + "_count", route="/v1/completions") >= NUM_REQUESTS, what=ttft)
    # What other tests have sent may be in it, too, and some of these not yet.
    assert 0 < cluster.metric(ttft + "_sum") / cluster.metric(ttft + "_count") < 10 * max(*waited_s, 1.0)
    for name, labels in (
        ("atom_kv_reads_total", {"outcome": "ok"}),
        ("atom_router_prompt_tokens_total", {}),
        ("atom_steps_total", {"execution": "eager"}),
        ("atom_memory_bytes", {"use": "weights", "role": "decode"}),
        ("atom_gang_healthy", {"role": "head"}),
        ("atom_prefix_cache_blocks", {"role": "prefill"}),
        ("atom_build_info", {"role": "ingress"}),
    ):
        cluster.wait_until(lambda name=name, labels=labels: cluster.metric(name, **labels) > 0, what=f"{name} moved")
    for role in ("ingress", "router", "head", "prefill", "decode"):
        cluster.wait_until(
            lambda role=role: cluster.metric("atom_process_resident_bytes", role=role) > 2**24, what=role
        )


def test_the_page_of_metrics_is_small_and_has_labels_of_ours_only(cluster: RunningCluster) -> None:
    page = cluster.get("/metrics")
    label_names = {label for metric in ALL_METRICS for label in metric.labels} | {"role", "replica", "le"}
    num_series = 0
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            num_series += 1
            assert set(sample.labels) <= label_names, sample
    assert num_series < 5000 and len(page) < 200 * num_series


def test_the_status_page_is_there_and_errors_of_the_cluster_are_shown(cluster: RunningCluster) -> None:
    assert "<title>atom_cluster</title>" in cluster.get("/")
    page = cluster.page()
    assert isinstance(page["recent_errors"], list) and len(page["recent_errors"]) <= 8
    # An engine that took the place of another has not told of itself at once.
    cluster.wait_until(lambda: all("recent_errors" in (replica["status"] or {}) for replica in cluster.replicas()))
