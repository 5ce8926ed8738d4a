"""A run over time and its distributions, small enough to keep: what pictures are made of. Knows no pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.client import RequestRecord
from benchmarks.report import seconds_of, succeeded

MAX_POINTS = 240
PERCENTS = tuple(range(101))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Equal windows of a run. Rates are per second; None where a window has no value."""

    window_s: float
    sent_per_s: list[float]
    ended_per_s: list[float]
    failed_per_s: list[float]
    under_way: list[float]
    """Requests, on average over the window."""
    prompt_tokens_per_s: list[float]
    """Of requests that were sent in the window and succeeded."""
    output_tokens_per_s: list[float]
    ttft_ms_median: list[float | None]
    """Of requests that were sent in the window."""
    ttft_ms_p99: list[float | None]


def timeline(records: Sequence[RequestRecord], *, begun_s: float, ended_s: float) -> Timeline:
    """Of at most `MAX_POINTS` windows of about a tenth of a second or more."""
    duration_s = max(1e-3, ended_s - begun_s)
    num = min(MAX_POINTS, max(1, round(duration_s / 0.1)))
    edges = np.linspace(0.0, duration_s, num + 1)
    window_s = duration_s / num
    sent = np.array([record.sent_s for record in records]) - begun_s
    ended = np.array([record.ended_s for record in records]) - begun_s
    failed = np.array([record.error is not None for record in records], dtype=bool)
    good = succeeded(records)
    median, p99 = _ttft_by_window(good, begun_s, edges)
    return Timeline(
        window_s=window_s,
        sent_per_s=_rates(sent, edges),
        ended_per_s=_rates(ended[~failed], edges),
        failed_per_s=_rates(ended[failed], edges),
        under_way=_mean_under_way(sent, ended, edges),
        prompt_tokens_per_s=_rates(
            np.array([record.sent_s for record in good]) - begun_s,
            edges,
            weights=np.array([record.num_prompt_tokens for record in good], dtype=np.float64),
        ),
        output_tokens_per_s=_output_rates(good, begun_s, edges),
        ttft_ms_median=median,
        ttft_ms_p99=p99,
    )


def quantiles_ms(records: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """0th to 100th percentile of each metric, of those that there are."""
    seconds = seconds_of(succeeded(records))
    return {name: (1e3 * np.percentile(found, PERCENTS)).tolist() for name, found in seconds.items() if len(found)}


def _rates(at_s: np.ndarray, edges: np.ndarray, weights: np.ndarray | None = None) -> list[float]:
    counts, _ = np.histogram(at_s, bins=edges, weights=weights)
    rates: list[float] = (counts / (edges[1] - edges[0])).tolist()
    return rates


def _output_rates(good: Sequence[RequestRecord], begun_s: float, edges: np.ndarray) -> list[float]:
    """A request's tokens count evenly for its events, since an event does not say how many it carries."""
    totals = np.zeros(len(edges) - 1)
    for record in good:
        at_s = np.asarray(record.event_times_s, dtype=np.float64) - begun_s
        totals += np.histogram(at_s, bins=edges)[0] * (record.num_output_tokens / len(at_s))
    rates: list[float] = (totals / (edges[1] - edges[0])).tolist()
    return rates


def _mean_under_way(sent: np.ndarray, ended: np.ndarray, edges: np.ndarray) -> list[float]:
    means = []
    for low, high in zip(edges, edges[1:]):
        inside = np.clip(np.minimum(ended, high) - np.maximum(sent, low), 0.0, None)
        means.append(float(inside.sum() / (high - low)))
    return means


def _ttft_by_window(
    good: Sequence[RequestRecord], begun_s: float, edges: np.ndarray
) -> tuple[list[float | None], list[float | None]]:
    median: list[float | None] = [None] * (len(edges) - 1)
    p99 = list(median)
    windows = np.digitize([record.sent_s - begun_s for record in good], edges) - 1
    ttft_ms = np.array([1e3 * (record.ttft_s or 0.0) for record in good])
    for index in range(len(median)):
        inside = ttft_ms[windows == index]
        if len(inside):
            median[index], p99[index] = float(np.median(inside)), float(np.percentile(inside, 99))
    return median, p99
