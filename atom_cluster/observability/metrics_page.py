"""Writes `docs/metrics.md` from the table: `python -m atom_cluster.observability.metrics_page > docs/metrics.md`."""

from __future__ import annotations

import sys

from atom_cluster.observability.metrics import ALL_METRICS, Metric

_INTRODUCTION = """\
# Metrics

Generated from `atom_cluster/observability/metrics.py` by `python -m atom_cluster.observability.metrics_page`; a test
fails when it is out of date. `/metrics` of the API answers with all of them as Prometheus text. Besides its own labels
every series carries those of the process that recorded it, such as `replica` and `role`.

| name | kind | unit | labels | meaning |
|---|---|---|---|---|
"""


def metrics_page() -> str:
    """The whole page as Markdown."""
    return _INTRODUCTION + "".join(_row(metric) for metric in ALL_METRICS)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {metric.help} |\n"


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
