"""What the server says of the same run: means of its own histograms, from two looks at its /metrics page.

A histogram's mean over a run is the difference of its sums over the difference of its counts, exactly; its percentiles
are only as fine as its buckets, so means are what is compared.

The server counts from a request's arrival at the ingress. What stands in front of it, the network and a proxy, only the
client sees; a request that computes nothing takes the same way, so `Front` sends one now and then beside the load.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import Report

TOLERANCE_MS = 2.0
TOLERANCE_SHARE = 0.02
SETTLE_S = 12.0
"""Longer than the period at which Ray's processes hand over what they counted, ten seconds."""
_SETTLE_LIMIT_S = 60.0
_LOOK_AGAIN_S = 1.0

TTFT = "atom_http_time_to_first_token_seconds"
TPOT = "atom_http_time_per_output_token_seconds"
ITL = "atom_http_inter_token_seconds"
E2EL = "atom_http_request_seconds"
HISTOGRAMS = (TTFT, TPOT, ITL, E2EL)
_DRAFTS = "atom_spec_draft_tokens_total"
_ACCEPTED = "atom_spec_accepted_tokens_total"


@dataclass(frozen=True, slots=True)
class Totals:
    """A histogram so far."""

    sum: float = 0.0
    count: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerMetrics:
    """One look at a page, over all label values."""

    histograms: Mapping[str, Totals]
    num_drafts: float = 0.0
    num_first_drafts: float = 0.0
    """Of the first position: one for each time that a request's drafts were verified."""
    num_accepted: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One latency as both sides have it."""

    metric: str
    client_ms: float
    front_ms: float
    """Of the client's, what the way to the ingress and back took; 0 between two events of one stream."""
    server_ms: float
    num_observed: int
    """By the server."""
    num_answered: int
    """Requests that the client has the latency of."""
    num_sent: int
    """Requests in all: of one that failed, the server may have the latency too."""

    @property
    def difference_ms(self) -> float:
        """What the client has more and the way does not explain."""
        return self.client_ms - self.front_ms - self.server_ms

    @property
    def is_close(self) -> bool:
        """Within 2 ms or 2 %, whichever is more, and of the same requests."""
        is_near = abs(self.difference_ms) <= max(TOLERANCE_MS, TOLERANCE_SHARE * self.server_ms)
        # Of gaps there are as many as events, which the way may have put together.
        return is_near and (self.metric == ITL or self.num_answered <= self.num_observed <= self.num_sent)


class Front:
    """Asks again and again, while the block runs, for something that computes nothing, and measures the answers."""

    def __init__(self, ask: Callable[[], Awaitable[object]], *, period_s: float = 0.2) -> None:
        self._ask = ask
        self._period_s = period_s
        self._seconds: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Front:
        await self._ask()  # the connection that the others use
        self._task = asyncio.create_task(self._go_on())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _go_on(self) -> None:
        while True:
            begun_s = time.monotonic()
            await self._ask()
            self._seconds.append(time.monotonic() - begun_s)
            await asyncio.sleep(self._period_s)

    @property
    def mean_ms(self) -> float:
        """0 if nothing was asked."""
        return 1e3 * statistics.fmean(self._seconds) if self._seconds else 0.0


def parse(page: str) -> ServerMetrics:
    """Of a page in Prometheus's text format. Raises ValueError for anything else."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    drafts = first = accepted = 0.0
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.endswith("_sum"):
                sums[family.name] = sums.get(family.name, 0.0) + sample.value
            elif sample.name.endswith("_count"):
                counts[family.name] = counts.get(family.name, 0.0) + sample.value
            elif sample.name == _DRAFTS:
                drafts += sample.value
                first += sample.value if sample.labels.get("position") == "0" else 0.0
            elif sample.name == _ACCEPTED:
                accepted += sample.value
    return ServerMetrics(
        histograms={name: Totals(sums.get(name, 0.0), counts.get(name, 0.0)) for name in HISTOGRAMS if name in counts},
        num_drafts=drafts,
        num_first_drafts=first,
        num_accepted=accepted,
    )


async def settled(look: Callable[[], Awaitable[str]], *, settle_s: float = SETTLE_S) -> ServerMetrics:
    """A look at the page once it has not changed for so long: processes hand over what they counted now and then.

    Raises TimeoutError if it goes on changing: others use the server too.
    """
    found = parse(await look())
    began_s = changed_s = time.monotonic()
    while time.monotonic() - changed_s < settle_s:
        if time.monotonic() - began_s > max(_SETTLE_LIMIT_S, 3 * settle_s):
            raise TimeoutError("/metrics goes on changing: somebody else uses this server")
        await asyncio.sleep(min(_LOOK_AGAIN_S, settle_s / 2))
        latest = parse(await look())
        if latest != found:
            found, changed_s = latest, time.monotonic()
    return found


def mean_ms(before: ServerMetrics, after: ServerMetrics, name: str) -> tuple[float, int] | None:
    """Mean of what a histogram got between two looks, and how many; None: it is not there or got nothing."""
    earlier, later = before.histograms.get(name, Totals()), after.histograms.get(name)
    if later is None or later.count <= earlier.count:
        return None
    count = later.count - earlier.count
    return 1e3 * (later.sum - earlier.sum) / count, round(count)


def speculation(before: ServerMetrics, after: ServerMetrics) -> tuple[float | None, float | None]:
    """Tokens per verified step of a request, and the share of drafts that were kept; None without speculation."""
    drafts = after.num_drafts - before.num_drafts
    first = after.num_first_drafts - before.num_first_drafts
    accepted = after.num_accepted - before.num_accepted
    return (1 + accepted / first if first else None), (accepted / drafts if drafts else None)


def compare(report: Report, before: ServerMetrics, after: ServerMetrics, *, front_ms: float) -> list[Agreement]:
    """Each latency that both sides have. ITL is between events on both sides, however many tokens they carry.

    front_ms: mean time of a request that computes nothing, beside the load.
    """
    found = []
    for name, metric in (("ttft", TTFT), ("tpot", TPOT), ("itl", ITL), ("e2el", E2EL)):
        server = mean_ms(before, after, metric)
        if name in report.latencies and server is not None:
            client_ms = report.latencies[name].mean
            found.append(
                Agreement(
                    metric=metric,
                    client_ms=client_ms,
                    front_ms=front_ms if name in ("ttft", "e2el") else 0.0,
                    server_ms=server[0],
                    num_observed=server[1],
                    num_answered=report.latencies[name].count,
                    num_sent=report.num_requests,
                )
            )
    return found


def as_table(agreements: Sequence[Agreement]) -> str:
    """For people."""
    lines = [f"{'mean, milliseconds':42}{'client':>10}{'front':>10}{'server':>10}{'difference':>12}{'observed':>10}"]
    for one in agreements:
        figures = f"{one.client_ms:10.3f}{one.front_ms:10.3f}{one.server_ms:10.3f}{one.difference_ms:12.3f}"
        verdict = "agree" if one.is_close else "DIFFER"
        lines.append(f"{one.metric:42}{figures}{one.num_observed:10}  {verdict}")
    return "\n".join(lines)
