"""Writes `docs/metrics.md` from the table: `python -m atom_cluster.observability.metrics_page > docs/metrics.md`."""

from __future__ import annotations

import sys

from atom_cluster.observability.metrics import SECTIONS
from atom_cluster.observability.metrics.kinds import Metric

_INTRODUCTION = """\
# Metrics

Generated from `atom_cluster/observability/metrics/` by `python -m atom_cluster.observability.metrics_page`; a test
fails when it is out of date. `/metrics` of the API answers with all of them as Prometheus text. Besides its own labels
every series carries those of the process that recorded it: `role`, `replica`, and those that Ray adds.
[How to look at a cluster](observability.md) says how Prometheus gets them, and what dashboard and alerts there are.

Values of labels come from bounded sets, such as route templates, status codes and classes of errors: no client can
make up new ones.
"""
_HEADER = """
| name | kind | unit | labels | meaning | when it is bad, what to do |
|---|---|---|---|---|---|
"""


def metrics_page() -> str:
    """The whole page as Markdown."""
    parts = [_INTRODUCTION]
    for title, metrics in SECTIONS.items():
        parts += [f"\n## {title}\n", _HEADER, *map(_row, metrics)]
    return "".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {metric.help} | {metric.advice} |\n"


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
