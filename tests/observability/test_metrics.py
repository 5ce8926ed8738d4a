"""The table itself: names follow the rules, every constant is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from atom_cluster.observability import metrics
from atom_cluster.observability.metrics import ALL_METRICS
from atom_cluster.observability.metrics.kinds import Metric
from atom_cluster.observability.metrics_page import metrics_page

_SUFFIX_BY_UNIT = {"s": "_seconds", "bytes": "_bytes", "tokens": "_tokens", "blocks": "_blocks"}


@pytest.mark.parametrize("metric", ALL_METRICS, ids=lambda metric: metric.name)
def test_a_name_starts_with_the_prefix_and_ends_with_unit_and_kind(metric: Metric) -> None:
    assert metric.name.startswith("atom_")
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    base = metric.name.removesuffix("_total")
    if metric.unit in _SUFFIX_BY_UNIT:
        assert base.endswith(_SUFFIX_BY_UNIT[metric.unit])


@pytest.mark.parametrize("metric", ALL_METRICS, ids=lambda metric: metric.name)
def test_histograms_and_only_they_have_increasing_buckets(metric: Metric) -> None:
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert all(low < high for low, high in zip(metric.buckets, metric.buckets[1:]))


def test_the_table_has_every_constant_once() -> None:
    constants = {name for name, value in vars(metrics).items() if isinstance(value, Metric)}
    assert len(constants) == len(ALL_METRICS) == len({metric.name for metric in ALL_METRICS})


@pytest.mark.parametrize("metric", ALL_METRICS, ids=lambda metric: metric.name)
def test_a_row_says_what_it_is_and_what_to_do(metric: Metric) -> None:
    for text in (metric.help, metric.advice):
        assert len(text) > 15 and text.endswith((".", "0.")) and "|" not in text and "\n" not in text


def test_no_name_can_be_taken_for_a_part_of_a_histogram() -> None:
    """Ray gets the parts of histograms as gauges of such names."""
    for metric in ALL_METRICS:
        if metric.kind != "histogram":
            assert not metric.name.endswith(("_sum", "_count", "_bucket"))


def test_no_label_is_one_that_exporters_add_or_call_otherwise() -> None:
    added = {"role", "replica", "le", "job", "instance", "metric", "value"}
    for metric in ALL_METRICS:
        assert not added & set(metric.labels)


def test_the_documentation_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == metrics_page()
