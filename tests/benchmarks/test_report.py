"""Arithmetic of a run, on records made by hand."""

from __future__ import annotations

import pytest

from benchmarks.client import RequestRecord
from benchmarks.report import Promises, as_table, percentile, summarize
from benchmarks.timeline import quantiles_ms, timeline


def record(sent_s: float, *event_times_s: float, tokens: int, error: str | None = None) -> RequestRecord:
    return RequestRecord(
        sent_s=sent_s,
        event_times_s=list(event_times_s),
        ended_s=event_times_s[-1] if event_times_s else sent_s + 1.0,
        num_prompt_tokens=10,
        num_output_tokens=tokens,
        num_cached_tokens=4,
        error=error,
    )


RUN = [
    record(100.0, 100.1, 100.2, 100.4, tokens=3),
    record(101.0, 101.3, 102.0, tokens=8),
    record(101.5, tokens=0, error="HTTP 503: full"),
]


def test_percentiles_interpolate_between_ranks() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)
    assert percentile([7.0], 99) == 7.0
    assert percentile([1.0, 2.0, 3.0], 100) == 3.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_latencies_and_throughput_of_a_run() -> None:
    report = summarize(RUN, duration_s=2.5, percentiles=[90.0, 99.0])
    assert (report.num_requests, report.num_succeeded, report.num_failed) == (3, 2, 1)
    assert (report.errors, report.error_samples) == ({"HTTP 503": 1}, {"HTTP 503": "HTTP 503: full"})
    assert report.per_s(report.num_output_tokens) == pytest.approx(11 / 2.5)
    assert (report.num_prompt_tokens, report.num_cached_tokens) == (20, 8)
    found = report.latencies
    assert (found["ttft"].mean, found["ttft"].median) == (pytest.approx(200), pytest.approx(200))
    assert found["tpot"].mean == pytest.approx((150 + 100) / 2)
    assert found["itl"].mean == pytest.approx((100 + 200 + 700) / 3)
    assert found["itl"].std == pytest.approx(262.467, rel=1e-4)
    assert found["e2el"].percentiles == {90.0: pytest.approx(940), 99.0: pytest.approx(994)}
    assert report.concurrency == pytest.approx(1.4 / 2.5)
    assert report.tokens_per_event == pytest.approx(11 / 5)
    assert report.mean_token_ms == pytest.approx(1000 / 9)


def test_a_run_of_failures_alone_has_no_latencies() -> None:
    report = summarize([record(0.0, tokens=0, error="timeout"), record(0.0, tokens=0)], duration_s=1.0)
    assert report.errors == {"timeout": 1, "no output": 1}
    assert not report.latencies
    assert report.tokens_per_event is report.mean_token_ms is None
    assert "error x1: timeout" in as_table(report)
    with pytest.raises(ValueError, match="no requests"):
        summarize([], duration_s=1.0)


def test_single_token_answers_have_no_time_per_output_token() -> None:
    report = summarize([record(0.0, 0.5, tokens=1)], duration_s=1.0)
    assert set(report.latencies) == {"ttft", "e2el"}
    table = as_table(report)
    assert "TTFT" in table
    assert "TPOT" not in table
    assert "E2EL" not in as_table(report, ["ttft"])


def test_answers_whose_tokens_nobody_counted_are_told() -> None:
    report = summarize([record(0.0, 0.5, 0.6, tokens=0), *RUN], duration_s=1.0)
    assert (report.num_succeeded, report.num_uncounted) == (3, 1)
    assert "WARNING: 1 answers came without a usage" in as_table(report)
    assert "WARNING" not in as_table(summarize(RUN, duration_s=1.0))


def test_a_request_that_broke_off_is_in_no_latency_and_no_throughput() -> None:
    broken = record(100.0, 100.001, 100.002, tokens=500, error="the stream ended early: its last event is missing")
    with_it, without = (summarize(runs, duration_s=2.5) for runs in ([*RUN, broken], RUN))
    assert (with_it.num_failed, without.num_failed) == (2, 1)
    assert with_it.latencies == without.latencies
    assert with_it.num_output_tokens == without.num_output_tokens
    assert with_it.concurrency == without.concurrency


def test_goodput_counts_what_was_promised_and_shows_what_it_hides() -> None:
    cut = record(0.0, 0.1, 0.11, tokens=2)
    cut.num_wanted_tokens = 9
    stalled = record(0.0, 0.1, *(0.1 + 0.01 * i for i in range(1, 30)), 1.4, tokens=31)
    runs = [record(0.0, 0.1, 0.12, 0.14, tokens=3), record(0.0, 2.5, 2.52, tokens=2), cut, stalled, RUN[2]]
    found = summarize(runs, duration_s=2.0, promises=Promises(ttft=2000, tpot=50)).goodput
    assert found is not None
    assert (found.num_good, found.requests_per_s) == (3, 1.5)
    assert (found.num_smooth, found.smooth_requests_per_s) == (1, 0.5)
    assert (found.stall_ms, found.num_stalls, found.num_stalled) == (250, 1, 1)
    assert found.stalled_s == pytest.approx(1.01 - 0.25)
    assert found.num_incomplete == 2
    assert summarize(RUN, duration_s=1.0, promises=Promises()).goodput is None


def test_a_promise_of_the_whole_time_and_one_that_cannot_be_broken() -> None:
    assert not Promises(e2el=300).kept_by(RUN[0])
    assert Promises(e2el=500).kept_by(RUN[0])
    assert Promises(tpot=1).kept_by(record(0.0, 0.5, tokens=1))
    assert Promises(stall=40).stall_s == 0.04
    assert Promises().stall_s == 1.0


def test_a_timeline_adds_up_to_the_run() -> None:
    found = timeline(RUN, begun_s=100.0, ended_s=102.5)
    assert len(found.sent_per_s) == 25
    assert found.window_s == pytest.approx(0.1)
    assert sum(found.sent_per_s) * found.window_s == pytest.approx(3)
    assert sum(found.ended_per_s) * found.window_s == pytest.approx(2)
    assert sum(found.failed_per_s) * found.window_s == pytest.approx(1)
    assert sum(found.output_tokens_per_s) * found.window_s == pytest.approx(11)
    assert sum(found.prompt_tokens_per_s) * found.window_s == pytest.approx(20)
    assert sum(found.under_way) * found.window_s == pytest.approx(0.4 + 1.0 + 1.0)
    assert [value for value in found.ttft_ms_median if value is not None] == [pytest.approx(100), pytest.approx(300)]


def test_quantiles_begin_and_end_with_the_extremes() -> None:
    found = quantiles_ms(RUN)
    assert (found["ttft"][0], found["ttft"][50], found["ttft"][100]) == tuple(map(pytest.approx, (100, 200, 300)))
    assert len(found["itl"]) == 101
    assert quantiles_ms(RUN[2:]) == {}
