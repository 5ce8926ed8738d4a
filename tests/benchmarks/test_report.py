"""Arithmetic of a run, on records made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.client import RequestRecord
from benchmarks.report import as_table, percentile, save, summarize


def _record(sent_s: float, *event_times_s: float, tokens: int, error: str | None = None) -> RequestRecord:
    return RequestRecord(
        sent_s=sent_s,
        event_times_s=list(event_times_s),
        ended_s=event_times_s[-1] if event_times_s else sent_s + 1.0,
        num_prompt_tokens=10,
        num_output_tokens=tokens,
        num_cached_tokens=4,
        error=error,
    )


def test_percentiles_interpolate_between_ranks() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)
    assert percentile([7.0], 99) == 7.0
    assert percentile([1.0, 2.0, 3.0], 100) == 3.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_latencies_and_throughput_of_a_run() -> None:
    report = summarize(
        [
            _record(100.0, 100.1, 100.2, 100.4, tokens=3),
            _record(101.0, 101.3, 102.0, tokens=8),
            _record(101.5, tokens=0, error="HTTP 503: full"),
        ]
    )
    assert (report.num_succeeded, report.num_failed) == (2, 1)
    assert report.errors == {"HTTP 503: full": 1}
    assert report.duration_s == pytest.approx(2.5)
    assert report.requests_per_s == pytest.approx(2 / 2.5)
    assert report.output_tokens_per_s == pytest.approx(11 / 2.5)
    assert report.prompt_tokens_per_s == pytest.approx(20 / 2.5)
    assert report.num_cached_tokens == 8
    assert report.ttft_ms is not None
    assert (report.ttft_ms.mean, report.ttft_ms.median) == (pytest.approx(200), pytest.approx(200))
    assert report.tpot_ms is not None
    assert report.tpot_ms.mean == pytest.approx((150 + 100) / 2)
    assert report.itl_ms is not None
    assert report.itl_ms.median == pytest.approx(200)
    assert report.itl_ms.mean == pytest.approx((100 + 200 + 700) / 3)
    assert report.e2e_ms is not None
    assert report.e2e_ms.p99 == pytest.approx(400 + 0.99 * 600)


def test_a_run_of_failures_alone_has_no_latencies() -> None:
    report = summarize([_record(0.0, tokens=0, error="timeout"), _record(0.0, tokens=0)])
    assert report.errors == {"timeout": 1, "no output": 1}
    assert report.ttft_ms is report.itl_ms is report.tpot_ms is report.e2e_ms is None
    assert report.output_tokens_per_s == 0
    assert "error x1: timeout" in as_table(report)
    with pytest.raises(ValueError, match="no requests"):
        summarize([])


def test_single_token_answers_have_no_time_per_output_token() -> None:
    report = summarize([_record(0.0, 0.5, tokens=1)])
    assert report.tpot_ms is None
    assert report.itl_ms is None
    assert "TTFT" in as_table(report)
    assert "TPOT" not in as_table(report)


def test_a_saved_result_says_how_to_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_BENCHMARK_RESULTS", str(tmp_path))
    path = save(
        summarize([_record(0.0, 0.5, tokens=1)]),
        arguments=["--model", "my model"],
        details={"cluster": {"replicas": []}},
    )
    saved = json.loads(path.read_text())
    assert saved["command"] == "python -m benchmarks.serving --model 'my model'"
    assert saved["hardware"]["num_cpus"] >= 1
    assert saved["report"]["ttft_ms"]["mean"] == pytest.approx(500)
    assert saved["cluster"] == {"replicas": []}
    assert {"commit", "time"} <= saved.keys()
