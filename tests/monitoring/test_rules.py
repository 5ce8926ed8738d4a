"""Alerts and recording rules: Prometheus understands them, they are about metrics that there are, and documented."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring.promql import MONITORING, assert_names_ours, promtool

GROUPS: list[dict[str, Any]] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
DOCS = MONITORING.parents[1] / "docs" / "observability.md"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": GROUPS}))
    shutil.copy(MONITORING / "rules_test.yaml", tmp_path)
    return tmp_path


def test_prometheus_understands_them(directory: Path) -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", directory / "rules.yml")


def test_they_fire_when_they_should_and_not_else(directory: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", directory / "rules_test.yaml")


def test_every_alert_is_tested_with_series_and_documented() -> None:
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    fired = {
        entry["alertname"] for test in tests for entry in test.get("alert_rule_test", ()) if entry.get("exp_alerts")
    }
    names = [rule["alert"] for rule in ALERTS]
    assert fired == set(names) and len(names) == len(set(names))
    assert set(re.findall(r"^\| `(Atom\w+)`", DOCS.read_text(), re.MULTILINE)) == set(names)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_names_our_metrics_with_their_labels(rule: dict[str, Any]) -> None:
    if rule.get("alert") == "AtomMetricsMissing":
        assert rule["expr"] == "absent(atom_build_info)"
    recorded = {entry["record"] for entry in RULES if "record" in entry}
    assert set(re.findall(r"atom:[a-z0-9_:]+", rule["expr"])) <= recorded
    assert_names_ours(rule["expr"])


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_it_means(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description"}
