"""From records of requests to latencies, throughput and goodput, in the field's definitions, and as a table.

All times are the client's. TTFT is from sending to the first event with output; TPOT (last - first) / (tokens - 1) of a
request; ITL the time between one event with output and the next, over all requests together, so an event that brings
several tokens counts as one gap; E2EL from sending to the last output. Token counts are those of the server's usage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.client import RequestRecord

METRICS = ("ttft", "tpot", "itl", "e2el")
_DEFAULT_STALL_MS = 1000.0
_STALL_FACTOR = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds."""

    count: int
    """Values that there were."""
    mean: float
    median: float
    std: float
    percentiles: Mapping[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promises:
    """What each request is to keep, in milliseconds. None: nothing is promised."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None
    stall: float | None = None
    """A gap between outputs that is called a stall; None: five times `tpot`, or a second."""

    @property
    def stall_s(self) -> float:
        """Seconds."""
        if self.stall is not None:
            return self.stall / 1e3
        return (_DEFAULT_STALL_MS if self.tpot is None else _STALL_FACTOR * self.tpot) / 1e3

    @property
    def is_empty(self) -> bool:
        """Whether nothing is promised."""
        return self.ttft is self.tpot is self.e2el is None

    def kept_by(self, record: RequestRecord) -> bool:
        """Whether a request that succeeded is as promised. Without a second token there is no TPOT to break it."""
        pairs = ((self.ttft, record.ttft_s), (self.tpot, record.tpot_s), (self.e2el, record.e2el_s))
        return all(limit is None or value is None or 1e3 * value <= limit for limit, value in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Requests as promised, and what the count hides: it can be raised by dropping requests or holding tokens back."""

    num_good: int
    requests_per_s: float
    num_smooth: int
    """Good ones without a stall and with all their tokens."""
    smooth_requests_per_s: float
    num_stalled: int
    """Requests, good or not, with at least one stall."""
    num_stalls: int
    stalled_s: float
    """Time above the limit, over all stalls."""
    num_incomplete: int
    """Requests that failed or got fewer tokens than they had to."""
    stall_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run. Latencies and tokens are over requests that succeeded; None where no request gives one."""

    num_requests: int
    num_succeeded: int
    errors: Mapping[str, int]
    """By kind."""
    error_samples: Mapping[str, str]
    """One whole message of each kind."""
    duration_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_uncounted: int
    """Answers that came without a usage: their tokens are in no figure."""
    concurrency: float
    """Mean number under way: the sum of E2EL over the duration."""
    tokens_per_event: float | None
    """Output tokens per event: above 1, ITL is longer than the time between tokens."""
    mean_token_ms: float | None
    """Mean time between tokens, over all tokens together; None: no request had two."""
    latencies: Mapping[str, Latency]
    """By name, of those that there are."""
    goodput: Goodput | None
    """None: nothing was promised."""

    @property
    def num_failed(self) -> int:
        """Requests without an answer, or with a broken one."""
        return self.num_requests - self.num_succeeded

    def per_s(self, count: float) -> float:
        """A count over the run's time."""
        return count / self.duration_s


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest ranks. Raises `ValueError` without values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def gaps_s(record: RequestRecord) -> np.ndarray:
    """Times between one event with output and the next."""
    return np.diff(np.asarray(record.event_times_s, dtype=np.float64))


def succeeded(records: Iterable[RequestRecord]) -> list[RequestRecord]:
    """Those with an answer."""
    return [record for record in records if record.error is None and record.event_times_s]


def seconds_of(records: Sequence[RequestRecord]) -> dict[str, np.ndarray]:
    """Values of each metric over requests that succeeded."""
    return {
        "ttft": np.array([value for record in records if (value := record.ttft_s) is not None]),
        "tpot": np.array([value for record in records if (value := record.tpot_s) is not None]),
        "itl": np.concatenate([gaps_s(record) for record in records]) if records else np.array([]),
        "e2el": np.array([value for record in records if (value := record.e2el_s) is not None]),
    }


def summarize(
    records: Sequence[RequestRecord],
    *,
    duration_s: float,
    percentiles: Sequence[float] = (99.0,),
    promises: Promises | None = None,
) -> Report:
    """Arithmetic of a run. Raises `ValueError` if there was none."""
    if not records:
        raise ValueError("no requests were sent")
    good = succeeded(records)
    bad = [(r.error_kind or "no output", r.error or "no output") for r in records if r.error or not r.event_times_s]
    seconds = seconds_of(good)
    num_output_tokens = sum(record.num_output_tokens for record in good)
    num_events = sum(len(record.event_times_s) for record in good)
    num_gaps = sum(record.num_output_tokens - 1 for record in good if record.tpot_s is not None)
    decoding_s = sum(record.event_times_s[-1] - record.event_times_s[0] for record in good if record.tpot_s is not None)
    return Report(
        num_requests=len(records),
        num_succeeded=len(good),
        errors=dict(Counter(kind for kind, _ in bad)),
        error_samples=dict(reversed(bad)),
        duration_s=duration_s,
        num_prompt_tokens=sum(record.num_prompt_tokens for record in good),
        num_output_tokens=num_output_tokens,
        num_cached_tokens=sum(record.num_cached_tokens for record in good),
        num_uncounted=sum(not record.num_output_tokens for record in good),
        concurrency=float(seconds["e2el"].sum()) / duration_s,
        tokens_per_event=num_output_tokens / num_events if num_events else None,
        mean_token_ms=1e3 * decoding_s / num_gaps if num_gaps else None,
        latencies={name: _latency(values, percentiles) for name, values in seconds.items() if len(values)},
        goodput=None if promises is None or promises.is_empty else judge_goodput(records, promises, duration_s),
    )


def _latency(seconds: np.ndarray, percentiles: Sequence[float]) -> Latency:
    ms = 1e3 * seconds
    return Latency(
        count=len(ms),
        mean=float(ms.mean()),
        median=float(np.median(ms)),
        std=float(ms.std()),
        percentiles={percent: float(np.percentile(ms, percent)) for percent in percentiles},
    )


def judge_goodput(records: Sequence[RequestRecord], promises: Promises, duration_s: float) -> Goodput:
    """How many requests kept all promises, and how many stalled or lack tokens."""
    stall_s = promises.stall_s
    num_good = num_smooth = num_stalled = num_stalls = 0
    stalled_s = 0.0
    for record in records:
        gaps = gaps_s(record)
        stalls = gaps[gaps > stall_s]
        num_stalled += len(stalls) > 0
        num_stalls += len(stalls)
        stalled_s += float((stalls - stall_s).sum())
        is_good = record.error is None and bool(record.event_times_s) and promises.kept_by(record)
        num_good += is_good
        num_smooth += is_good and not len(stalls) and not record.is_incomplete
    return Goodput(
        num_good=num_good,
        requests_per_s=num_good / duration_s,
        num_smooth=num_smooth,
        smooth_requests_per_s=num_smooth / duration_s,
        num_stalled=num_stalled,
        num_stalls=num_stalls,
        stalled_s=stalled_s,
        num_incomplete=sum(record.is_incomplete for record in records),
        stall_ms=1e3 * stall_s,
    )


def as_table(report: Report, metrics: Sequence[str] = METRICS) -> str:
    """The report for people."""
    lines = [
        f"requests            {report.num_succeeded} succeeded, {report.num_failed} failed, {report.duration_s:.2f} s",
        f"throughput          {report.per_s(report.num_succeeded):.2f} requests/s, "
        f"{report.per_s(report.num_prompt_tokens):.1f} prompt tokens/s, "
        f"{report.per_s(report.num_output_tokens):.1f} output tokens/s",
        f"under way           {report.concurrency:.2f} requests on average",
        f"cached prompt       {report.num_cached_tokens} of {report.num_prompt_tokens} tokens",
    ]
    if report.num_uncounted:
        lines.append(
            f"WARNING: {report.num_uncounted} answers came without a usage: their tokens are in no figure, and TPOT is "
            "of the others."
        )
    if report.tokens_per_event is not None:
        lines.append(f"tokens per event    {report.tokens_per_event:.3f}")
    lines += _latency_lines(report, metrics)
    if report.goodput is not None:
        lines += _goodput_lines(report.goodput)
    lines += [f"error x{count}: {report.error_samples[kind]}" for kind, count in report.errors.items()]
    return "\n".join(lines)


def _latency_lines(report: Report, metrics: Sequence[str]) -> list[str]:
    shown = {name: report.latencies[name] for name in metrics if name in report.latencies}
    if not shown:
        return []
    percents = list(next(iter(shown.values())).percentiles)
    head = f"{'milliseconds':20}{'mean':>10}{'median':>10}{'std':>10}" + "".join(f"{f'p{p:g}':>10}" for p in percents)
    lines = [head]
    for name, latency in shown.items():
        values = [latency.mean, latency.median, latency.std, *(latency.percentiles[p] for p in percents)]
        lines.append(f"{name.upper():20}" + "".join(f"{value:10.2f}" for value in values))
    return lines


def _goodput_lines(goodput: Goodput) -> list[str]:
    return [
        f"goodput             {goodput.requests_per_s:.2f} requests/s as promised ({goodput.num_good})",
        f"smooth goodput      {goodput.smooth_requests_per_s:.2f} requests/s without a stall or a loss",
        f"stalls              {goodput.num_stalls} above {goodput.stall_ms:.0f} ms in {goodput.num_stalled} requests, "
        f"{goodput.stalled_s:.2f} s beyond; {goodput.num_incomplete} requests incomplete",
    ]
