"""The Grafana dashboard asks for what is recorded, in a language that Prometheus understands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from atom_cluster.observability.metrics import ALL_METRICS, HTTP_TTFT_S, KV_READS
from atom_cluster.tools.dashboard import dashboard
from atom_cluster.tools.dashboard_check import Finding, scrape_of_ray, substituted
from atom_cluster.tools.dashboard_panels import Panel, rows, selector
from tests.monitoring.promql import MONITORING, assert_names_ours, promtool

FILE = MONITORING / "dashboards" / "atom_cluster.json"
PANELS = [panel for panels in rows().values() for panel in panels]
EXPRS = [substituted(query.expr) for panel in PANELS for query in panel.queries]


def shown() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def test_the_file_is_what_the_generator_writes() -> None:
    assert shown() == dashboard(), "run scripts/gen-dashboard"


@pytest.mark.parametrize("expr", EXPRS)
def test_a_query_names_our_metrics_with_their_labels(expr: str) -> None:
    assert "$" not in expr
    assert_names_ours(expr)


def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"check:{number}", "expr": expr} for number, expr in enumerate(EXPRS)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", path)


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in shown()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in shown()["panels"]]
    assert len(ids) == len(set(ids))


def test_every_metric_but_a_few_is_looked_at() -> None:
    text = FILE.read_text() + (MONITORING / "rules.yaml").read_text()
    unseen = {metric.name for metric in ALL_METRICS if metric.name not in text}
    assert unseen == {
        "atom_requests_remote",
        "atom_requests_finished_total",
        "atom_inter_token_latency_seconds",
        "atom_request_seconds",
        "atom_prompt_tokens_total",
        "atom_kv_pages",
        "atom_kv_transfer_seconds",
        "atom_graph_capture_seconds",
        "atom_router_index_blocks",
        "atom_router_snapshot_requests_total",
        "atom_http_request_seconds",
        "atom_choice_info",
        "atom_gang_start_seconds",
    }


def test_a_label_that_a_metric_lacks_is_refused_when_the_query_is_made() -> None:
    assert selector(KV_READS, outcome="ok") == 'atom_kv_reads_total{role=~"$role",replica=~"$replica",outcome=~"ok"}'
    assert selector(HTTP_TTFT_S, suffix="_sum") == 'atom_http_time_to_first_token_seconds_sum{route=~"$route"}'
    with pytest.raises(ValueError, match="has no label reason"):
        selector(KV_READS, reason="ok")


def test_an_empty_panel_is_bad_unless_it_may_be_empty() -> None:
    loud, quiet = (Panel("t", "d", "short", (), is_quiet=is_quiet) for is_quiet in (False, True))
    assert Finding("r", loud, "x", 0).is_bad and not Finding("r", loud, "x", 1).is_bad
    assert not Finding("r", quiet, "x", 0).is_bad and Finding("r", quiet, "x", 0, "parse error").is_bad


def test_prometheus_takes_the_relabelling_of_the_monitor(tmp_path: Path) -> None:
    job = {"job_name": "ray", **scrape_of_ray(tmp_path / "targets.json")}
    (tmp_path / "targets.json").write_text("[]")
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [job]}))
    promtool("check", "config", tmp_path / "prometheus.yml")
