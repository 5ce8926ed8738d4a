"""RayMetrics: a `MetricSink` that exports through Ray, so that metrics appear on each node's Ray metrics port.

Recording only counts in memory, since the step loop does it often; a thread hands the counts to Ray once per period.
Knows nothing of which metrics exist.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping

from prometheus_client.utils import floatToGoString
from ray.util import metrics as ray_metrics

from atom_cluster.observability.memory import Histogram
from atom_cluster.observability.metrics import Metric, MetricSink
from atom_cluster.observability.process import ProcessMeter

_log = logging.getLogger(__name__)
_LE = "le"
"""Prometheus' label for the upper bound of a bucket."""
_Series = tuple[str, tuple[str, ...]]
"""Name of a metric, and its labels' values in the table's order."""


class RayMetrics:
    """See `observability.metrics.MetricSink`. Thread-safe; `close` flushes and ends the thread, and is idempotent.

    Memory and the work of a flush grow with the number of series and not with what is recorded.

    Ray prefixes every name with `ray_`, and adds `_total` to counters by itself. Its own histograms are not used: they
    take observations one at a time, here and again on each node, in Python, and make up their sums from the middles of
    buckets. What Prometheus knows as a histogram is exported as what it consists of, `_bucket`, `_sum` and `_count`;
    for Ray these are gauges, whose values are ours.
    """

    def __init__(
        self,
        *,
        labels: Mapping[str, str],
        period_s: float = 1.0,
        collect: Callable[[MetricSink], None] | None = None,
    ) -> None:
        """Every series also gets these labels (replica, role), whose names no metric may use.

        `collect` is called once per period, to record what nobody does by himself; by default, what the process takes.
        """
        self._collect = ProcessMeter().record if collect is None else collect
        self._period_s = period_s
        self._exports = _Exports(labels)
        self._lock = threading.Lock()
        self._metric_by_name: dict[str, Metric] = {}
        self._sums: defaultdict[_Series, float] = defaultdict(float)
        self._values: dict[_Series, float] = {}
        self._histograms: dict[_Series, Histogram] = {}
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._export_periodically, name="ray-metrics", daemon=True)
        self._thread.start()

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Add to a counter. Raises `ValueError` for labels that are not the metric's."""
        series = self._series(metric, labels)
        with self._lock:
            self._sums[series] += value

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Replace a gauge's value. Raises `ValueError` for labels that are not the metric's."""
        series = self._series(metric, labels)
        with self._lock:
            self._values[series] = value

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add an observation to a histogram. Raises `ValueError` for labels that are not the metric's."""
        series = self._series(metric, labels)
        bucket = bisect_left(metric.buckets, value)
        with self._lock:
            found = self._histograms.get(series)
            if found is None:
                found = self._histograms[series] = Histogram([0] * (len(metric.buckets) + 1))
            found.bucket_counts[bucket] += 1
            found.sum += value

    def close(self) -> None:
        """Flush and stop."""
        self._is_closed.set()
        self._thread.join()

    def _series(self, metric: Metric, labels: dict[str, str]) -> _Series:
        self._metric_by_name[metric.name] = metric
        try:
            values = tuple([labels[name] for name in metric.labels])
        except KeyError:
            values = ()
        if len(values) != len(labels) or len(labels) != len(metric.labels):
            raise ValueError(f"{metric.name} has the labels {list(metric.labels)}, recorded with {sorted(labels)}")
        return metric.name, values

    def _flush(self) -> None:
        self._collect(self)
        with self._lock:
            sums, self._sums = self._sums, defaultdict(float)
            # All of them, every time: Ray forgets a gauge that is not set again and again.
            values = dict(self._values)
            histograms = {
                series: Histogram(found.bucket_counts.copy(), found.sum) for series, found in self._histograms.items()
            }
        for (name, labels), total in sums.items():
            self._exports.add(self._metric_by_name[name], labels, total)
        for (name, labels), value in values.items():
            self._exports.set(self._metric_by_name[name], labels, value)
        for (name, labels), found in histograms.items():
            self._exports.set_histogram(self._metric_by_name[name], labels, found)

    def _export_periodically(self) -> None:
        """Supervisor of the thread: a failing export is logged and ends the thread, never the engine."""
        is_last = False
        while not is_last:
            is_last = self._is_closed.wait(self._period_s)
            try:
                self._flush()
            except Exception:
                _log.exception("metrics are no longer exported")
                raise


class _Exports:
    """The metrics that Ray knows, made as they are needed. Used from one thread."""

    def __init__(self, constant_labels: Mapping[str, str]) -> None:
        self._constant_labels = dict(constant_labels)
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}

    def add(self, metric: Metric, label_values: tuple[str, ...], amount: float) -> None:
        """To a counter."""
        if amount <= 0:
            return  # Ray takes no zero increments
        counter = self._counters.get(metric.name)
        if counter is None:
            name = metric.name.removesuffix("_total")
            counter = ray_metrics.Counter(name, metric.help, (*self._constant_labels, *metric.labels))
            counter.set_default_tags(self._constant_labels)
            self._counters[metric.name] = counter
        counter.inc(amount, dict(zip(metric.labels, label_values)))

    def set(self, metric: Metric, label_values: tuple[str, ...], value: float) -> None:
        """A gauge."""
        self._gauge(metric).set(value, dict(zip(metric.labels, label_values)))

    def set_histogram(self, metric: Metric, label_values: tuple[str, ...], found: Histogram) -> None:
        """All that Prometheus has of a histogram. Every bucket counts what is below it, too; empty ones are exported as
        well, as the first that there is would be taken for one that begins at 0."""
        labels = dict(zip(metric.labels, label_values))
        buckets = self._gauge(metric, "_bucket", _LE)
        counts = itertools.accumulate(found.bucket_counts)
        for bound, count in zip((*metric.buckets, math.inf), counts, strict=True):
            text = floatToGoString(bound)  # type: ignore[no-untyped-call]  # as in Prometheus' own client
            buckets.set(count, {**labels, _LE: text})
        self._gauge(metric, "_sum").set(found.sum, labels)
        self._gauge(metric, "_count").set(found.count, labels)

    def _gauge(self, metric: Metric, suffix: str = "", *more_labels: str) -> ray_metrics.Gauge:
        name = metric.name + suffix
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = ray_metrics.Gauge(name, metric.help, (*self._constant_labels, *metric.labels, *more_labels))
            gauge.set_default_tags(self._constant_labels)
            self._gauges[name] = gauge
        return gauge
