"""What a metric is, and the protocol through which the code records one.

Whoever records names a constant of the table (`metrics.inc(PREEMPTIONS, cause="admission")`), so a metric cannot be
misspelt, undocumented or recorded with other labels than its own. Exporters implement `MetricSink`: `NullMetrics` here,
`MemoryMetrics` in `observability.memory` (Prometheus text, tests), one over Ray's metrics in `gang`. They add constant
labels of their own, such as replica and role. This module knows nothing of exporters, Ray or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

MetricKind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row of the table."""

    name: str
    """Full Prometheus name: starts with `atom_`, ends with the unit, counters end with `_total`."""
    kind: MetricKind
    help: str
    advice: str
    """For operators: when its value is bad, and what to do then."""
    unit: str
    """`s`, `bytes`, `tokens`, `blocks`, `requests` ...: what one is one of."""
    labels: tuple[str, ...] = ()
    """Names of the labels that each recording gives, all of them and no others. Their values are of a bounded set,
    which no client can add to."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, increasing, without infinity. Empty for other kinds."""


class MetricSink(Protocol):
    """Where recordings go. Cheap, thread-safe, never raises for lack of an exporter."""

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Add `value` >= 0 to a counter."""
        ...

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Replace the value of a gauge."""
        ...

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        ...


class NullMetrics:
    """A `MetricSink` that records nothing."""

    def inc(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Ignore."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Ignore."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Ignore."""


LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SHORT_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
STEP_SECONDS = (*SHORT_S, 2.5, 5.0)
FIRST_TOKEN_S = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0),
)
"""What clients wait for a first token; fine around the usual objectives, 0.2 to 3 s."""
TOKEN_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
)
"""What clients wait for a next token; fine around the usual objectives, 20 to 100 ms."""
NUM_TOKENS = tuple(float(2**power) for power in range(0, 15))
NUM_LONG_TOKENS = tuple(float(2**power) for power in range(0, 19, 2)) + (1048576.0,)
