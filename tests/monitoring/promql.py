"""What the tests of dashboard and rules share: which of our metrics and labels an expression names, and promtool."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from atom_cluster.observability.metrics import ALL_METRICS

MONITORING = Path(__file__).resolve().parents[2] / "kubernetes" / "monitoring"
ADDED = {"role", "replica", "le"}
"""Labels that every series may have besides those of the table."""

_BY_SAMPLE = {metric.name: metric for metric in ALL_METRICS} | {
    f"{metric.name}{suffix}": metric
    for metric in ALL_METRICS
    if metric.kind == "histogram"
    for suffix in ("_bucket", "_sum", "_count")
}


def assert_names_ours(expr: str) -> None:
    """Every metric is of the table, with its own labels only; histograms by their parts, others as they are."""
    bare = re.sub(r'"[^"]*"', '""', expr)
    labels_there = set(ADDED)
    found = re.findall(r"(?<![a-z_:])(atom_[a-z0-9_]+)\s*(?:\{([^}]*)\})?", bare)
    assert found or "atom:" in expr, expr
    for sample, matchers in found:
        assert sample in _BY_SAMPLE, f"{sample} is not in the table: {expr}"
        metric = _BY_SAMPLE[sample]
        assert metric.kind != "histogram" or sample != metric.name, f"{sample} has parts: {expr}"
        assert metric.kind == "gauge" or re.search(r"(rate|increase)\(|offset|- \(sum by", expr), (
            f"a counter as it is: {expr}"
        )
        named = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", matchers or ""))
        assert named <= {*metric.labels, *ADDED}, f"{sample} has no labels {named - {*metric.labels, *ADDED}}"
        labels_there |= set(metric.labels)
    for group in re.findall(r"\bby\s*\(([^)]*)\)", bare):
        assert {label.strip() for label in group.split(",")} <= labels_there, f"grouped by what is not there: {expr}"


def promtool(*arguments: object) -> str:
    """Run promtool; what it said. The test is skipped where there is none."""
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
