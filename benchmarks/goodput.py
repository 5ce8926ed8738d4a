"""Requests per second that meet what was promised: a trace is replayed, and each request judged by what its client saw.

Open loop: requests are sent at the trace's times, scaled to a rate, whether or not earlier ones have ended, and their
latencies count from when they were due. Knows nothing of engines.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.client import RequestRecord
from benchmarks.datasets.request import random_ids
from benchmarks.datasets.traces import AZURE_CONVERSATION, TraceRow, read_azure
from benchmarks.report import gaps_s, percentile

SAMPLE = slice(16_000, 18_000)
"""Rows of the Azure trace whose beginnings are like the whole: the first 200, 400 and 800 have prompts of 1,202, 1,181
and 1,180 tokens on average and outputs of 200, 202 and 225; the whole trace 1,155 and 211."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a request's client is to see, in seconds."""

    ttft_s: float = 2.0
    """From when it was due to its first token."""
    itl_s: float = 0.05
    """Between tokens, on average over the request."""


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request of a replay."""

    due_s: float
    """After the start."""
    prompt: tuple[int, ...]
    num_output_tokens: int


@dataclass(slots=True)
class Seen:
    """One request as its client saw it."""

    request: TimedRequest
    record: RequestRecord
    is_cut: bool
    """It was ended before all its tokens were there."""
    late_s: float
    """How much after its time the client sent it."""

    @property
    def mean_itl_s(self) -> float:
        """Of the tokens behind the first one; 0 if there are none."""
        return self.record.tpot_s or 0.0

    @property
    def p99_itl_s(self) -> float:
        """Between one arrival of tokens and the next; 0 if there was one."""
        gaps = gaps_s(self.record).tolist()
        return percentile(gaps, 99) if gaps else 0.0

    def keeps(self, promise: Promise, *, itl_s: float) -> bool:
        """Whether the promise was kept, with this as the time between tokens."""
        is_complete = self.is_cut or self.record.num_output_tokens == self.request.num_output_tokens
        ttft_s = self.record.ttft_s
        is_right = self.record.error is None and is_complete
        return is_right and ttft_s is not None and ttft_s <= promise.ttft_s and itl_s <= promise.itl_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """One replay. Times in milliseconds; percentiles are over requests that got a token."""

    rate_per_s: float
    """Requests per second that were sent."""
    num_requests: int
    num_good: int
    """TTFT, and mean time between tokens, as promised."""
    goodput_per_s: float
    share_good: float
    num_good_by_p99: int
    """TTFT, and the 99th percentile of a request's times between tokens, as promised."""
    goodput_by_p99_per_s: float
    num_late_first: int
    """Requests whose first token came too late, or never."""
    num_slow: int
    """Requests whose first token came in time, but not the others: late, or never."""
    num_cut: int
    """Requests that were ended before all their tokens were there, and judged by what was."""
    errors: dict[str, int]
    ttft_ms_median: float
    ttft_ms_p99: float
    itl_ms_median: float
    """Over the requests' means."""
    itl_ms_p99: float
    output_tokens_per_s: float
    """Until the last answer."""
    client_late_ms_p99: float
    """How much after their times requests were sent."""

    def __str__(self) -> str:
        return (
            f"{self.rate_per_s:6.1f}/s {self.num_requests:5d} requests: good {self.share_good:6.1%} = "
            f"{self.goodput_per_s:6.2f}/s (by p99 {self.num_good_by_p99 / self.num_requests:6.1%}), TTFT "
            f"{self.ttft_ms_median:7.1f} / {self.ttft_ms_p99:7.1f} ms, ITL {self.itl_ms_median:5.1f} / "
            f"{self.itl_ms_p99:5.1f} ms, {self.output_tokens_per_s:7.0f} tok/s, late {self.num_late_first}, slow "
            f"{self.num_slow}, cut {self.num_cut}, errors {sum(self.errors.values())}, "
            f"client late {self.client_late_ms_p99:.1f} ms"
        )


def read_trace(path: Path | None = None) -> list[TraceRow]:
    """Rows in order of arrival, of a file in the Azure trace's format; None: `SAMPLE` of the shipped one, from time 0.

    Raises ValueError for a file with other columns.
    """
    if path is not None:
        return list(read_azure(path))
    rows = list(read_azure(AZURE_CONVERSATION))[SAMPLE]
    return [TraceRow(row.arrival_s - rows[0].arrival_s, *row.lengths) for row in rows]


def scaled(
    rows: Sequence[TraceRow],
    *,
    rate_per_s: float,
    window_s: float,
    vocab_size: int,
    seed: int = 0,
    shorten: float = 1.0,
) -> list[TimedRequest]:
    """The trace's first requests, as many as arrive at this rate in the window, with random prompts.

    Their times are the trace's, stretched by one factor. shorten: divides all lengths, for machines that are slow.
    Raises ValueError when the trace has too few rows.
    """
    num_requests = max(2, round(rate_per_s * window_s))
    if num_requests > len(rows):
        raise ValueError(f"{rate_per_s} requests/s for {window_s} s are {num_requests}; the trace has {len(rows)}")
    rows = rows[:num_requests]
    factor = window_s / max(1e-9, rows[-1].arrival_s - rows[0].arrival_s)
    rng = random.Random(seed)
    return [
        TimedRequest(
            (row.arrival_s - rows[0].arrival_s) * factor,
            random_prompt(rng, max(1, int(row.num_prompt_tokens / shorten)), vocab_size),
            max(1, int(row.num_output_tokens / shorten)),
        )
        for row in rows
    ]


def random_prompt(rng: random.Random, length: int, vocab_size: int) -> tuple[int, ...]:
    """Token ids of which none is a special one, in usual vocabularies."""
    return tuple(rng.choices(range(*random_ids(vocab_size)), k=length))


async def replay(
    requests: Sequence[TimedRequest],
    send: Callable[[TimedRequest, float], Awaitable[tuple[RequestRecord, bool]]],
    *,
    cut: Callable[[], None],
    drain_s: float,
) -> list[Seen]:
    """Send all at their times; `cut` what has not ended so long after the last one was due.

    send: takes a request and when, by the monotonic clock, it is due; the record, and whether it was cut.
    """
    start_s = time.monotonic() + 0.05

    async def one(request: TimedRequest) -> Seen:
        due_s = start_s + request.due_s
        late_s = time.monotonic() - due_s
        record, is_cut = await send(request, due_s)
        return Seen(request, record, is_cut, late_s)

    tasks = []
    for request in requests:
        await asyncio.sleep(max(0.0, start_s + request.due_s - time.monotonic()))
        tasks.append(asyncio.create_task(one(request)))
    await asyncio.wait(tasks, timeout=drain_s)
    cut()
    return list(await asyncio.gather(*tasks))


def judge(seen: Sequence[Seen], *, window_s: float, promise: Promise) -> Goodput:
    """Arithmetic of a replay whose requests were due within the window."""
    good = [one for one in seen if one.keeps(promise, itl_s=one.mean_itl_s)]
    num_good_by_p99 = sum(one.keeps(promise, itl_s=one.p99_itl_s) for one in seen)
    ttfts_s = [ttft_s for one in seen if (ttft_s := one.record.ttft_s) is not None]
    itls_s = [one.mean_itl_s for one in seen if one.record.num_output_tokens > 1]
    num_late_first = len(seen) - sum(ttft_s <= promise.ttft_s for ttft_s in ttfts_s)
    began_s = min(one.record.sent_s for one in seen)
    last_s = max(one.record.event_times_s[-1] if one.record.event_times_s else began_s for one in seen)
    return Goodput(
        rate_per_s=len(seen) / window_s,
        num_requests=len(seen),
        num_good=len(good),
        goodput_per_s=len(good) / window_s,
        share_good=len(good) / len(seen),
        num_good_by_p99=num_good_by_p99,
        goodput_by_p99_per_s=num_good_by_p99 / window_s,
        num_late_first=num_late_first,
        num_slow=len(seen) - len(good) - num_late_first,
        num_cut=sum(one.is_cut for one in seen),
        errors=dict(Counter(one.record.error for one in seen if one.record.error is not None)),
        ttft_ms_median=1e3 * statistics.median(ttfts_s) if ttfts_s else 0.0,
        ttft_ms_p99=1e3 * percentile(ttfts_s, 99) if ttfts_s else 0.0,
        itl_ms_median=1e3 * statistics.median(itls_s) if itls_s else 0.0,
        itl_ms_p99=1e3 * percentile(itls_s, 99) if itls_s else 0.0,
        output_tokens_per_s=sum(one.record.num_output_tokens for one in seen) / max(1e-9, last_s - began_s),
        client_late_ms_p99=1e3 * percentile([one.late_s for one in seen], 99),
    )
