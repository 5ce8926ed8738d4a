"""MemoryMetrics: a `MetricSink` that keeps the numbers in this process, for Prometheus text and for tests.

It is strict: a recording of another kind or with other labels than the table says is an error. Knows nothing of HTTP,
Ray or of which metrics exist.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from atom_cluster.observability.metrics import Metric, MetricKind

LabelValues = tuple[str, ...]


@dataclass(slots=True)
class Histogram:
    """Observations of one histogram under one set of labels."""

    bucket_counts: list[int]
    """Observations per bucket, not cumulative; one more entry than the metric has bounds."""
    sum: float = 0.0

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.bucket_counts)


@dataclass(slots=True)
class _Family:
    """All series of one metric, by label values in the table's order."""

    metric: Metric
    values: dict[LabelValues, float] = field(default_factory=dict)
    histograms: dict[LabelValues, Histogram] = field(default_factory=dict)


class MemoryMetrics:
    """Counters, gauges and histograms in memory. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._family_by_name: dict[str, _Family] = {}

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Add to a counter. Raises `ValueError` for a negative value, another kind or other labels."""
        if value < 0:
            raise ValueError(f"{metric.name}: a counter cannot go down by {-value}")
        key = _label_values(metric, "counter", labels)
        with self._lock:
            values = self._family(metric).values
            values[key] = values.get(key, 0.0) + float(value)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Replace a gauge. Raises `ValueError` for another kind or other labels."""
        key = _label_values(metric, "gauge", labels)
        with self._lock:
            self._family(metric).values[key] = float(value)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add to a histogram. Raises `ValueError` for another kind or other labels."""
        key = _label_values(metric, "histogram", labels)
        with self._lock:
            histograms = self._family(metric).histograms
            histogram = histograms.get(key)
            if histogram is None:
                histogram = histograms[key] = Histogram([0] * (len(metric.buckets) + 1))
            histogram.bucket_counts[bisect_left(metric.buckets, value)] += 1
            histogram.sum += float(value)

    def value(self, metric: Metric, **labels: str) -> float:
        """Sum of a counter's or gauge's series that have these labels, all if none are given; 0 if there are none.

        Raises `ValueError` for a label that is not the metric's.
        """
        with self._lock:
            return sum(value for _, value in _matching(metric, self._family(metric).values, labels))

    def histogram(self, metric: Metric, **labels: str) -> Histogram:
        """The same of a histogram's series: a copy; empty if nothing was observed."""
        total = Histogram([0] * (len(metric.buckets) + 1))
        with self._lock:
            for _, found in _matching(metric, self._family(metric).histograms, labels):
                total.bucket_counts = [sum(counts) for counts in zip(total.bucket_counts, found.bucket_counts)]
                total.sum += found.sum
        return total

    def series(self, metric: Metric) -> dict[LabelValues, float]:
        """All series of a counter or gauge, by label values in the table's order."""
        with self._lock:
            return dict(self._family(metric).values)

    def _family(self, metric: Metric) -> _Family:
        family = self._family_by_name.get(metric.name)
        if family is None:
            family = self._family_by_name[metric.name] = _Family(metric)
        return family

    def sample_lines(self, constant_labels: Mapping[str, str]) -> dict[str, tuple[Metric, list[str]]]:
        """Prometheus sample lines by metric name, each with the constant labels in front of its own."""
        with self._lock:
            return {
                name: (family.metric, list(_family_lines(family, constant_labels)))
                for name, family in self._family_by_name.items()
            }


def prometheus_text(sources: Iterable[tuple[Mapping[str, str], MemoryMetrics]]) -> str:
    """Prometheus text (version 0.0.4) of several sinks, each with the labels that tell it from the others."""
    lines_by_name: dict[str, tuple[Metric, list[str]]] = {}
    for constant_labels, metrics in sources:
        for name, (metric, lines) in metrics.sample_lines(constant_labels).items():
            lines_by_name.setdefault(name, (metric, []))[1].extend(lines)
    parts: list[str] = []
    for name in sorted(lines_by_name):
        metric, lines = lines_by_name[name]
        parts += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}", *lines]
    return "".join(f"{line}\n" for line in parts)


_V = TypeVar("_V")


def _matching(
    metric: Metric, series: Mapping[LabelValues, _V], labels: Mapping[str, str]
) -> Iterable[tuple[LabelValues, _V]]:
    if not labels.keys() <= set(metric.labels):
        raise ValueError(f"{metric.name} has the labels {list(metric.labels)}, asked for {sorted(labels)}")
    wanted = [labels.get(name) for name in metric.labels]
    for key, value in series.items():
        if all(want is None or want == have for want, have in zip(wanted, key)):
            yield key, value


def _label_values(metric: Metric, kind: MetricKind, labels: Mapping[str, str]) -> LabelValues:
    if metric.kind != kind:
        raise ValueError(f"{metric.name} is a {metric.kind}, recorded as a {kind}")
    if len(labels) != len(metric.labels) or any(name not in labels for name in metric.labels):
        raise ValueError(f"{metric.name} has the labels {list(metric.labels)}, recorded with {sorted(labels)}")
    return tuple(labels[name] for name in metric.labels)


def _family_lines(family: _Family, constant_labels: Mapping[str, str]) -> Iterable[str]:
    metric = family.metric
    for key, value in family.values.items():
        labels = {**constant_labels, **dict(zip(metric.labels, key))}
        yield f"{metric.name}{_braces(labels)} {_number(value)}"
    for key, histogram in family.histograms.items():
        labels = {**constant_labels, **dict(zip(metric.labels, key))}
        cumulative = 0
        for bound, count in zip((*metric.buckets, float("inf")), histogram.bucket_counts):
            cumulative += count
            bound_text = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield f"{metric.name}_bucket{_braces({**labels, 'le': bound_text})} {cumulative}"
        yield f"{metric.name}_sum{_braces(labels)} {_number(histogram.sum)}"
        yield f"{metric.name}_count{_braces(labels)} {cumulative}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() else repr(value)


def _braces(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
