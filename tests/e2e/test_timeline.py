"""Where a request's time went, as a running cluster tells it, and the line that its log has of it."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import RunningCluster

pytestmark = [pytest.mark.ray, pytest.mark.demo_model]

MODEL = "smollm2-135m-instruct"


def complete(cluster: RunningCluster, prompt: str, request_id: str, **body: object) -> tuple[dict[str, Any], float]:
    """The timeline of an answer, and how long its client waited for it."""
    wanted = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, **body}
    with httpx.Client(base_url=cluster.url, timeout=60) as http:
        began_s = time.monotonic()
        answer = http.post("/v1/completions", json=wanted, headers={"X-Request-Id": request_id})
        waited_s = time.monotonic() - began_s
        assert answer.status_code == 200, answer.text
        timeline: dict[str, Any] = http.get(f"/v1/requests/{request_id}/timeline").json()
        assert http.get(f"/v1/requests/{timeline['id']}/timeline").json() == timeline
    assert timeline["request_id"] == request_id
    return timeline, waited_s


def test_spans_of_both_kinds_of_request_add_up_to_its_latency(cluster: RunningCluster) -> None:
    prompt = "Once upon a time there was a " + "very " * 40 + "long timeline that"
    cold, cold_s = complete(cluster, prompt, "timeline-cold")
    warm, warm_s = complete(cluster, prompt, "timeline-warm", stream=True)
    for timeline, waited_s in ((cold, cold_s), (warm, warm_s)):
        (output,) = timeline["outputs"]
        spans = output["spans"]
        assert abs(sum(span["duration_s"] for span in spans) - timeline["latency_s"]) < 1e-3
        assert timeline["latency_s"] < waited_s
        assert all(span["duration_s"] > 0 for span in spans) and output["num_tokens"] == 12
        assert not any(span["name"] == "unattributed" for span in spans)
    roles = [
        {(span["name"], span["replica"].split("-")[0]) for span in timeline["outputs"][0]["spans"] if "replica" in span}
        for timeline in (cold, warm)
    ]
    here = {(name, "ingress") for name in ("read", "check", "prepare", "route", "answer")}
    both = here | {("decode", "decode")}
    assert roles[0] >= both | {("prefill", "prefill"), ("publish", "prefill")}
    # Decode has the prompt's blocks now, and computes the little that is missing itself.
    assert roles[1] >= both | {("prefill", "decode")}
    assert cold["outputs"][0]["attempts"][0]["kv_read_bytes"] > 0


def test_a_request_has_a_line_in_the_log_and_nothing_it_said_is_in_it(cluster: RunningCluster) -> None:
    complete(cluster, "A most unusual prompt", "log-line-1")

    def lines() -> list[dict[str, Any]]:
        text = cluster.log.read_text(errors="replace") if cluster.log is not None else ""
        found = [line[line.index('{"time"') :] for line in text.splitlines() if '"request_id": "log-line-1"' in line]
        return [json.loads(line[: line.rindex("}") + 1]) for line in found]

    cluster.wait_until(lambda: bool(lines()), what="the log names the request")
    (entry,) = [line for line in lines() if line["logger"] == "access"]
    assert (entry["status"], entry["route"], entry["output_tokens"]) == (200, "/v1/completions", 12)
    assert entry["engine"].startswith("decode-") and entry["replica"].startswith("ingress-")
    assert entry["ttft_s"] < entry["total_s"] and entry["role"] == "ingress"
    assert cluster.log is not None and "unusual prompt" not in cluster.log.read_text(errors="replace")
