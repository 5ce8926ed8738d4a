"""From records of requests to latencies and throughput, as a table for people and as JSON to keep."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.client import RequestRecord
from benchmarks.records import save_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds."""

    mean: float
    median: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run. Latencies are over requests that succeeded; None where no request gives one."""

    num_succeeded: int
    num_failed: int
    errors: dict[str, int]
    duration_s: float
    """From the first request sent to the last one ended."""
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    ttft_ms: Latency | None
    """From sending to the first output."""
    tpot_ms: Latency | None
    """(last output - first output) / (tokens - 1), per request."""
    itl_ms: Latency | None
    """Between one streamed event and the next, over all requests together."""
    e2e_ms: Latency | None
    """From sending to the end."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest ranks. Raises `ValueError` without values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summarize(records: Sequence[RequestRecord]) -> Report:
    """Arithmetic of a run. Raises `ValueError` if there was none."""
    if not records:
        raise ValueError("no requests were sent")
    good = [record for record in records if record.error is None and record.event_times_s]
    errors = Counter(record.error or "no output" for record in records if record.error or not record.event_times_s)
    duration_s = max(record.ended_s for record in records) - min(record.sent_s for record in records)
    num_prompt_tokens = sum(record.num_prompt_tokens for record in good)
    num_output_tokens = sum(record.num_output_tokens for record in good)
    return Report(
        num_succeeded=len(good),
        num_failed=len(records) - len(good),
        errors=dict(errors),
        duration_s=duration_s,
        requests_per_s=len(good) / duration_s,
        prompt_tokens_per_s=num_prompt_tokens / duration_s,
        output_tokens_per_s=num_output_tokens / duration_s,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        num_cached_tokens=sum(record.num_cached_tokens for record in good),
        ttft_ms=_latency([record.event_times_s[0] - record.sent_s for record in good]),
        tpot_ms=_latency(
            [
                (record.event_times_s[-1] - record.event_times_s[0]) / (record.num_output_tokens - 1)
                for record in good
                if record.num_output_tokens > 1
            ]
        ),
        itl_ms=_latency(
            [
                later - earlier
                for record in good
                for earlier, later in zip(record.event_times_s, record.event_times_s[1:])
            ]
        ),
        e2e_ms=_latency([record.ended_s - record.sent_s for record in good]),
    )


def _latency(seconds: Sequence[float]) -> Latency | None:
    if not seconds:
        return None
    return Latency(
        mean=1e3 * statistics.fmean(seconds),
        median=1e3 * statistics.median(seconds),
        p99=1e3 * percentile(seconds, 99),
    )


def as_table(report: Report) -> str:
    """The report for people."""
    lines = [
        f"requests            {report.num_succeeded} succeeded, {report.num_failed} failed, {report.duration_s:.2f} s",
        f"throughput          {report.requests_per_s:.2f} requests/s, {report.prompt_tokens_per_s:.1f} prompt tokens/s,"
        f" {report.output_tokens_per_s:.1f} output tokens/s",
        f"cached prompt       {report.num_cached_tokens} of {report.num_prompt_tokens} tokens",
        f"{'milliseconds':20}{'mean':>10}{'median':>10}{'p99':>10}",
    ]
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        latency: Latency | None = getattr(report, name)
        if latency is not None:
            label = name.removesuffix("_ms").upper()
            lines.append(f"{label:20}{latency.mean:10.2f}{latency.median:10.2f}{latency.p99:10.2f}")
    lines += [f"error x{count}: {error}" for error, count in report.errors.items()]
    return "\n".join(lines)


def save(report: Report, *, arguments: Sequence[str], details: dict[str, object]) -> Path:
    """Write the report with what is needed to repeat it, and the given details."""
    return save_record("serving", "", {"report": asdict(report), **details}, arguments=arguments)
