"""The rule of regressions, pages of results, and what /metrics says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import Rule, compare_runs, main
from benchmarks.html_report import main as write_report
from benchmarks.html_report import page
from benchmarks.server_metrics import ITL, TTFT, Agreement, mean_ms, parse, settled, speculation

BASE: dict[str, Any] = {
    "date": "20261121-120000",
    "backend": "vllm",
    "model_id": "m",
    "num_prompts": 10,
    "completed": 10,
    "duration": 5.0,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 4,
    "request_throughput": 2.0,
    "output_throughput": 1000.0,
    "total_token_throughput": 2000.0,
    "mean_ttft_ms": 100.0,
    "median_ttft_ms": 100.0,
    "p99_ttft_ms": 200.0,
    "mean_tpot_ms": 10.0,
}


def regressions(**changed: float) -> list[str]:
    found, _ = compare_runs([BASE], [BASE | changed], Rule())
    return [one.metric for one in found if one.is_regression]


def test_five_percent_of_throughput_and_ten_of_latency_are_the_limits() -> None:
    assert regressions() == []
    assert regressions(output_throughput=951.0, mean_ttft_ms=109.0) == []
    assert regressions(output_throughput=949.0) == ["output_throughput"]
    assert regressions(mean_ttft_ms=111.0, mean_tpot_ms=12.0) == ["mean_ttft_ms", "mean_tpot_ms"]
    assert regressions(output_throughput=2000.0, mean_ttft_ms=1.0) == []


def test_next_to_nothing_is_no_regression() -> None:
    small = BASE | {"mean_tpot_ms": 0.01}
    found, _ = compare_runs([small], [small | {"mean_tpot_ms": 0.02}], Rule())
    assert not any(one.is_regression for one in found)


def test_the_status_says_whether_anything_got_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, other = (tmp_path / name for name in ("before.json", "after.json", "other.json"))
    before.write_text(json.dumps(BASE))
    after.write_text(json.dumps(BASE | {"mean_ttft_ms": 150.0, "completed": 9}))
    other.write_text("[]")
    assert main([str(before), str(before)]) == 0
    assert main([str(before), str(after)]) == 1
    output = capsys.readouterr().out
    assert re.search(r"mean_ttft_ms +100\.000 +150\.000 +\+50\.0%  WORSE", output)
    assert "1 requests of the second file failed" in output
    assert main([str(before), str(after), "--max-latency-growth", "60"]) == 0
    assert main([str(before), str(other)]) == 2
    assert main([str(before), str(tmp_path / "away.json")]) == 2


def test_runs_without_a_figure_in_common_are_not_taken_for_equal(tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(BASE))
    after.write_text(json.dumps({"output_throughput": None, "num_prompts": 10}))
    assert main([str(before), str(after)]) == 2


def test_what_makes_runs_unlike_is_noted() -> None:
    before = BASE | {"total_input_tokens": 1000, "total_output_tokens": 100, "atom_cluster": {"total_cached_tokens": 0}}
    changes = {"model_id": "n", "total_input_tokens": 1030, "total_output_tokens": 101, "completed": 10}
    _, notes = compare_runs([before], [before | changes | {"atom_cluster": {"total_cached_tokens": 515}}], Rule())
    assert notes == [
        "c4: model_id was m, is n",
        "c4: total_input_tokens was 100.0 per request, is 103.0",
        "c4: 0% of the prompts' tokens were cached, now 50% are",
    ]
    assert compare_runs([before], [before], Rule())[1] == []


def test_runs_of_sweeps_are_paired_by_what_was_swept() -> None:
    before = [BASE, BASE | {"max_concurrency": 8, "output_throughput": 1500.0}, BASE | {"max_concurrency": 16}]
    after = [BASE | {"max_concurrency": 8, "output_throughput": 1000.0}, BASE, BASE | {"max_concurrency": 2}]
    found, notes = compare_runs(before, after, Rule())
    assert [(one.run, one.metric) for one in found if one.is_regression] == [("c8", "output_throughput")]
    assert notes == ["c16 is only in the first file", "c2 is only in the second file"]
    with pytest.raises(ValueError, match="no run"):
        compare_runs(before, [BASE | {"max_concurrency": 5}], Rule())


def test_a_page_is_one_file_that_loads_nothing_and_names_nothing_twice(tmp_path: Path) -> None:
    timeline = {
        "window_s": 1.0,
        "sent_per_s": [1.0, 2.0],
        "ended_per_s": [0.0, 3.0],
        "failed_per_s": [0.0, 1.0],
        "under_way": [1.0, 1.0],
        "prompt_tokens_per_s": [5.0, 5.0],
        "output_tokens_per_s": [5.0, 5.0],
        "ttft_ms_median": [None, 10.0],
        "ttft_ms_p99": [None, 20.0],
    }
    own = {
        "timeline": timeline,
        "quantiles_ms": {"ttft": list(range(101)), "itl": [0.0] * 60 + [1.0] * 41, "tpot": [0.0] * 101},
        "errors": {"HTTP 503": 1},
        "error_samples": {"HTTP 503": "<script>alert(1)</script>"},
        "num_failed": 1,
        "client": {"is_bottleneck": True, "event_loop_lag_ms_p99": 30.0, "cpu_share": 0.5},
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(BASE | {"atom_cluster": own}))
    assert write_report([str(path), "--output", str(tmp_path / "a.html"), "--title", "A & B"]) == 0
    html = (tmp_path / "a.html").read_text()
    assert "<h1>A &amp; B</h1>" in html
    assert "<script" not in html
    assert not re.findall(r'(?:src|href)="(?!#)', html)
    assert not re.findall(r"url\((?!#)", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    assert "did not keep up" in html
    assert write_report([str(tmp_path / "away.json")]) == 2
    path.write_text(json.dumps({"sweep": "x", "runs": [BASE, BASE | {"max_concurrency": 8}]}))
    assert write_report([str(path), "--output", str(tmp_path / "a.html")]) == 0
    assert "concurrency 8" in (tmp_path / "a.html").read_text()


def test_results_of_atoms_own_client_can_be_shown_too() -> None:
    html = page([BASE, BASE | {"max_concurrency": 8, "request_goodput:": 1.5}, BASE | {"max_concurrency": None}])
    assert html.count("<svg") == 4
    assert "concurrency 8" in html
    with pytest.raises(ValueError, match="no result"):
        page([])


PAGE = """
# TYPE atom_http_time_to_first_token_seconds histogram
atom_http_time_to_first_token_seconds_bucket{{le="+Inf",route="a"}} 2
atom_http_time_to_first_token_seconds_sum{{route="a"}} {sum_a}
atom_http_time_to_first_token_seconds_count{{route="a"}} 2
atom_http_time_to_first_token_seconds_sum{{route="b"}} 1.0
atom_http_time_to_first_token_seconds_count{{route="b"}} {count_b}
# TYPE atom_spec_draft_tokens_total counter
atom_spec_draft_tokens_total{{position="0"}} {drafts}
atom_spec_draft_tokens_total{{position="1"}} {drafts}
# TYPE atom_spec_accepted_tokens_total counter
atom_spec_accepted_tokens_total{{position="0"}} {accepted}
"""


def test_means_are_of_what_came_between_two_looks() -> None:
    before = parse(PAGE.format(sum_a=0.5, count_b=1, drafts=10, accepted=4))
    after = parse(PAGE.format(sum_a=1.5, count_b=5, drafts=20, accepted=9))
    assert mean_ms(before, after, TTFT) == (250.0, 4)
    assert mean_ms(before, after, ITL) is None
    assert mean_ms(after, after, TTFT) is None
    assert speculation(before, after) == (1.5, 0.25)
    assert speculation(after, after) == (None, None)


@pytest.mark.parametrize(
    ("metric", "num_observed", "server_ms", "is_close"),
    [(TTFT, 10, 101.9, True), (TTFT, 10, 103.0, False), (TTFT, 11, 100.0, True), (TTFT, 9, 100.0, False)]
    + [(TTFT, 13, 100.0, False), (ITL, 500, 100.0, True)],
)
def test_figures_agree_if_they_are_near_and_of_the_same_requests(
    metric: str, num_observed: int, server_ms: float, is_close: bool
) -> None:
    found = Agreement(
        metric=metric,
        client_ms=110.0,
        front_ms=10.0,
        server_ms=server_ms,
        num_observed=num_observed,
        num_answered=10,
        num_sent=12,
    )
    assert found.is_close is is_close


async def test_a_look_waits_until_the_page_has_come_to_rest() -> None:
    pages: Iterator[str] = iter(PAGE.format(sum_a=1, count_b=count, drafts=0, accepted=0) for count in (1, 2, 3))
    last = ""

    async def look() -> str:
        nonlocal last
        last = next(pages, last)
        return last

    found = await settled(look, settle_s=0.05)
    assert found.histograms[TTFT].count == 5

    async def restless() -> str:
        restless.count += 1  # type: ignore[attr-defined]
        return PAGE.format(sum_a=1, count_b=restless.count, drafts=0, accepted=0)  # type: ignore[attr-defined]

    restless.count = 0  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.server_metrics._SETTLE_LIMIT_S", 0.1)
        with pytest.raises(TimeoutError, match="somebody else"):
            await settled(restless, settle_s=0.03)
