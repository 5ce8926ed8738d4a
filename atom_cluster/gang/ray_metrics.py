"""RayMetrics: a `MetricSink` that exports through Ray, so that metrics appear on each node's Ray metrics port.

Recording only appends to memory, since the step loop does it often; a thread hands everything to Ray once per period.
Knows nothing of which metrics exist.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Protocol

from ray.util import metrics as ray_metrics

from atom_cluster.observability.metrics import Metric, MetricSink
from atom_cluster.observability.process import ProcessMeter

_log = logging.getLogger(__name__)
OBSERVED = "_observed"
"""What stands behind the name of a histogram in that of the counter of its sum; Ray adds `_total`."""
_Series = tuple[str, tuple[str, ...]]
"""Name of a metric, and its labels' values in the table's order."""


class RayMetrics:
    """See `observability.metrics.MetricSink`. Thread-safe; `close` flushes and ends the thread, and is idempotent.

    Ray prefixes every name with `ray_`, and adds `_total` to counters by itself. Of a histogram it keeps counts, and
    takes each observation for the middle of its bucket, so that its sums are wrong; the right sum of a histogram is
    exported beside it as a counter, whose name ends with `OBSERVED`. Whoever collects puts it in the other's place.
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
        self._constant_labels = dict(labels)
        self._period_s = period_s
        self._lock = threading.Lock()
        self._metric_by_name: dict[str, Metric] = {}
        self._sums: defaultdict[_Series, float] = defaultdict(float)
        self._values: dict[_Series, float] = {}
        self._observations: defaultdict[_Series, list[float]] = defaultdict(list)
        self._exporter_by_name: dict[str, _Exporter] = {}
        self._is_broken = False
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
        with self._lock:
            # Nobody empties the lists any more once the export has failed.
            if not self._is_broken:
                self._observations[series].append(value)

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
            observations, self._observations = self._observations, defaultdict(list)
        for series, total in sums.items():
            # Ray takes no zero increments.
            if total > 0:
                self._export(series, [total])
        for series, value in values.items():
            self._export(series, [value])
        for series, observed in observations.items():
            self._export(series, observed)

    def _export(self, series: _Series, recorded: list[float]) -> None:
        name, label_values = series
        metric = self._metric_by_name[name]
        exporter = self._exporter_by_name.get(name)
        if exporter is None:
            exporter = self._exporter_by_name[name] = _make_exporter(metric, self._constant_labels)
        labels = dict(zip(metric.labels, label_values))
        exporter.record(recorded, labels)

    def _export_periodically(self) -> None:
        """Supervisor of the thread: a failing export is logged and ends the thread, never the engine."""
        is_last = False
        while not is_last:
            is_last = self._is_closed.wait(self._period_s)
            try:
                self._flush()
            except Exception:
                self._is_broken = True
                _log.exception("metrics are no longer exported")
                raise


class _Exporter(Protocol):
    """One Ray metric, whatever its kind."""

    def record(self, values: list[float], labels: dict[str, str]) -> None:
        """Hand recordings to Ray."""
        ...


class _Counter:
    def __init__(self, metric: Metric, constant_labels: Mapping[str, str]) -> None:
        self._counter = ray_metrics.Counter(
            metric.name.removesuffix("_total"), metric.help, (*constant_labels, *metric.labels)
        )
        self._counter.set_default_tags(dict(constant_labels))

    def record(self, values: list[float], labels: dict[str, str]) -> None:
        self._counter.inc(sum(values), labels)


class _Gauge:
    def __init__(self, metric: Metric, constant_labels: Mapping[str, str]) -> None:
        self._gauge = ray_metrics.Gauge(metric.name, metric.help, (*constant_labels, *metric.labels))
        self._gauge.set_default_tags(dict(constant_labels))

    def record(self, values: list[float], labels: dict[str, str]) -> None:
        self._gauge.set(values[-1], labels)


class _Histogram:
    def __init__(self, metric: Metric, constant_labels: Mapping[str, str]) -> None:
        self._histogram = ray_metrics.Histogram(
            metric.name, metric.help, list(metric.buckets), (*constant_labels, *metric.labels)
        )
        self._histogram.set_default_tags(dict(constant_labels))
        self._sum = ray_metrics.Counter(metric.name + OBSERVED, metric.help, (*constant_labels, *metric.labels))
        self._sum.set_default_tags(dict(constant_labels))

    def record(self, values: list[float], labels: dict[str, str]) -> None:
        for value in values:
            self._histogram.observe(value, labels)
        if (total := sum(values)) > 0:
            self._sum.inc(total, labels)


def _make_exporter(metric: Metric, constant_labels: Mapping[str, str]) -> _Exporter:
    kinds: dict[str, Callable[[Metric, Mapping[str, str]], _Exporter]] = {
        "counter": _Counter,
        "gauge": _Gauge,
        "histogram": _Histogram,
    }
    return kinds[metric.kind](metric, constant_labels)
