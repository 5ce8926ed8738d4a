from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from benchmarks.client import RequestRecord
from benchmarks.datasets.traces import TraceRow
from benchmarks.goodput import (
    Promise,
    Seen,
    TimedRequest,
    judge,
    random_prompt,
    read_trace,
    replay,
    scaled,
)

PROMISE = Promise(ttft_s=2.0, itl_s=0.05)


def seen(
    times_s: list[float],
    *,
    due_s: float = 0.0,
    num_wanted: int | None = None,
    error: str | None = None,
    cut: bool = False,
) -> Seen:
    """A request whose tokens came at these times, one at each."""
    request = TimedRequest(due_s, (1, 2, 3), len(times_s) if num_wanted is None else num_wanted)
    record = RequestRecord(sent_s=due_s, event_times_s=times_s, num_output_tokens=len(times_s), error=error)
    return Seen(request, record, cut, 0.001)


def test_the_sample_of_the_trace_begins_like_the_whole_does() -> None:
    rows = read_trace()
    assert len(rows) == 2000
    assert [row.arrival_s for row in rows] == sorted(row.arrival_s for row in rows)
    for count in (200, 400, 800):
        prompts = sum(row.num_prompt_tokens for row in rows[:count]) / count
        outputs = sum(row.num_output_tokens for row in rows[:count]) / count
        assert (prompts, outputs) == (pytest.approx(1155, rel=0.05), pytest.approx(211, rel=0.07))


def test_a_file_with_other_columns_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens\n0,1\n")
    with pytest.raises(ValueError, match="ContextTokens"):
        read_trace(path)


def test_a_trace_is_stretched_to_a_rate_and_keeps_its_bursts() -> None:
    rows = [TraceRow(100.0 + at_s, 8 * (i + 1), 4 * (i + 1)) for i, at_s in enumerate((0, 1, 10, 40, 80, 400))]
    requests = scaled(rows, rate_per_s=2.5, window_s=2.0, vocab_size=5000, shorten=4)
    assert [request.due_s for request in requests] == pytest.approx([0.0, 0.025, 0.25, 1.0, 2.0])
    assert [len(request.prompt) for request in requests] == [2, 4, 6, 8, 10]
    assert [request.num_output_tokens for request in requests] == [1, 2, 3, 4, 5]
    assert requests == scaled(rows, rate_per_s=2.5, window_s=2.0, vocab_size=5000, shorten=4)
    with pytest.raises(ValueError, match="has 6"):
        scaled(rows, rate_per_s=10, window_s=2.0, vocab_size=5000)


def test_prompts_leave_out_special_tokens_whatever_the_vocabulary() -> None:
    assert min(random_prompt(random.Random(0), 500, 30_000)) >= 1000
    assert {token // 128 for token in random_prompt(random.Random(0), 500, 256)} == {1}


def test_a_request_is_good_if_first_and_mean_times_are_as_promised() -> None:
    good = seen([1.9, 1.94, 1.99])
    assert good.keeps(PROMISE, itl_s=good.mean_itl_s)
    stalled = seen([0.1, *(0.1 + 0.01 * i for i in range(1, 20)), 0.4])
    assert stalled.mean_itl_s < 0.05 < stalled.p99_itl_s
    for bad in (
        seen([2.1, 2.11]),
        seen([0.1, 0.2]),
        seen([]),
        seen([0.1, 0.11], error="lost"),
        seen([0.1, 0.11], num_wanted=3),
    ):
        assert not bad.keeps(PROMISE, itl_s=bad.mean_itl_s)
    assert seen([0.1, 0.11], num_wanted=3, cut=True).keeps(PROMISE, itl_s=0.01)


def test_a_replay_is_judged_over_its_window() -> None:
    found = judge(
        [
            seen([0.5, 0.52, 0.54], due_s=0.25),
            seen([3.5], due_s=1.0),
            seen([1.5, 1.7], due_s=1.2),
            seen([2.0, 2.01], due_s=1.5, num_wanted=9, cut=True),
            seen([], due_s=2.0, error="gone"),
        ],
        window_s=2.0,
        promise=PROMISE,
    )
    assert (found.num_requests, found.num_good, found.num_late_first, found.num_slow, found.num_cut) == (5, 2, 2, 1, 1)
    assert (found.rate_per_s, found.goodput_per_s, found.share_good) == (2.5, 1.0, 0.4)
    assert found.errors == {"gone": 1}
    assert found.ttft_ms_median == pytest.approx(400.0)
    assert found.output_tokens_per_s == pytest.approx(8 / 3.25)
    assert "40.0%" in str(found)


async def test_requests_are_sent_when_they_are_due_and_cut_when_the_drain_is_over() -> None:
    sent_s: list[float] = []
    end = asyncio.Event()

    async def send(request: TimedRequest, due_s: float) -> tuple[RequestRecord, bool]:
        sent_s.append(time.monotonic() - due_s)
        record = RequestRecord(sent_s=due_s)
        if request.num_output_tokens == 2:
            await end.wait()
        return record, request.num_output_tokens == 2

    requests = [TimedRequest(0.0, (1,), 2), TimedRequest(0.1, (1,), 1), TimedRequest(0.2, (1,), 1)]
    begun_s = time.monotonic()
    found = await replay(requests, send, cut=end.set, drain_s=0.3)
    assert 0.5 < time.monotonic() - begun_s < 20
    assert [one.is_cut for one in found] == [True, False, False]
    assert all(0 <= late_s < 10 for late_s in sent_s)
    assert [one.record.sent_s - found[0].record.sent_s for one in found] == pytest.approx([0.0, 0.1, 0.2])
