"""Conditional disaggregation against always and never sending prompts to prefill, over a recorded mix of requests."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.simulation import SimulationConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.observability.metrics import ROUTER_PLACES
from benchmarks.goodput import read_trace
from tests.engine.traffic import Arrival, Outcome, Told, Traffic, at_rate, outcome, read_sample

TRANSFERS = {
    "remote": KvTransferConfig(min_remote_tokens=1, conditional_prefill=False),
    "local": KvTransferConfig(min_remote_tokens=1_000_000),
    "conditional": KvTransferConfig(),
}
TTFT_S, ITL_S = 1.0, 0.02
RATE = 20.0
"""Requests per second: a quarter more prompt tokens than prefill can compute."""


@dataclass(frozen=True)
class Run:
    outcome: Outcome
    places: dict[str, int]


def run(
    transfer: KvTransferConfig, arrivals: list[Arrival], scheduler: SchedulerConfig | None = None
) -> tuple[Traffic, list[Told]]:
    traffic = Traffic(transfer=transfer, scheduler=scheduler or SchedulerConfig())
    return traffic, traffic.run(arrivals)


def places(traffic: Traffic) -> dict[str, int]:
    counts = {place: int(traffic.metrics.value(ROUTER_PLACES, place=place)) for place in ROUTER_PLACES_SEEN}
    return {place: count for place, count in counts.items() if count}


ROUTER_PLACES_SEEN = ("remote", "short", "decode_sooner", "prefill_busy")


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """All three ways at a rate that neither engine can serve alone."""
    found = {}
    for name, transfer in TRANSFERS.items():
        traffic, told = run(transfer, at_rate(read_sample(), RATE))
        found[name] = Run(outcome(told, ttft_s=TTFT_S, itl_s=ITL_S), places(traffic))
    return found


def test_more_requests_are_answered_in_time_than_by_always_or_never_using_prefill(runs: dict[str, Run]) -> None:
    assert runs["remote"].places == {"remote": 120} and runs["local"].places == {"short": 120}
    goodput = {name: found.outcome.goodput for name, found in runs.items()}
    assert goodput["conditional"] > 0.9
    assert goodput["conditional"] > 2 * max(goodput["remote"], goodput["local"])


def test_first_tokens_come_several_times_sooner(runs: dict[str, Run]) -> None:
    ttft_s = {name: found.outcome.mean_ttft_s for name, found in runs.items()}
    assert ttft_s["conditional"] < min(ttft_s["remote"], ttft_s["local"]) / 3


def test_rows_that_decode_are_disturbed_far_less_than_by_computing_everything_there(runs: dict[str, Run]) -> None:
    itl_s = {name: found.outcome.mean_itl_s for name, found in runs.items()}
    assert itl_s["remote"] < itl_s["conditional"] < itl_s["local"] / 2


def test_both_engines_compute_prompts_and_the_reasons_say_why(runs: dict[str, Run]) -> None:
    counts = runs["conditional"].places
    assert counts["remote"] > 40 and counts["prefill_busy"] > 30


def test_the_same_requests_take_the_same_time(runs: dict[str, Run]) -> None:
    _, told = run(TRANSFERS["conditional"], at_rate(read_sample(), RATE))
    assert outcome(told, ttft_s=TTFT_S, itl_s=ITL_S) == runs["conditional"].outcome


def test_a_prefill_engine_with_nothing_to_do_gets_long_prompts_and_short_ones_are_not_worth_it() -> None:
    lengths = [6000, 6000, 6000, 40, 6000, 40, 40, 6000]
    arrivals = [Arrival(2.0 * number, length, 30) for number, length in enumerate(lengths)]
    traffic, told = run(KvTransferConfig(min_remote_tokens=16), arrivals)
    assert places(traffic) == {"remote": 5, "decode_sooner": 3}
    assert all(one.ttft_s < 0.27 for one in told)


@pytest.mark.parametrize(("away", "place"), [("decode", "decode_away"), ("prefill", "prefill_away")])
def test_either_group_serves_alone_while_the_other_is_away(away: str, place: str) -> None:
    traffic = Traffic()
    traffic.be_away(away, 3.0, 9.0)
    told = traffic.run(at_rate(read_sample(), 8.0))
    assert len(told) == 120
    result = outcome(told, ttft_s=TTFT_S, itl_s=0.05)
    assert result.goodput > 0.95 and result.p99_ttft_s < 1.0
    assert 30 < traffic.metrics.value(ROUTER_PLACES, place=place) < 70
    assert traffic.metrics.value(ROUTER_PLACES, place="remote") > 20


def test_steps_that_decode_are_no_longer_than_configured() -> None:
    """Prompts that decode computes itself beside others, in chunks that fit."""
    arrivals = [Arrival(0.02 * number, 400, 100) for number in range(20)] + [Arrival(1.0, 8000, 5)]
    gaps = {}
    for limit_s in (None, 0.03):
        _, told = run(TRANSFERS["local"], arrivals, SchedulerConfig(max_itl_s=limit_s))
        gaps[limit_s] = max(one.longest_gap_s for one in told[10:20])
    assert gaps[None] > 0.3
    assert gaps[0.03] < 0.035


MEASURED = SimulationConfig(
    base_s=0.0038,
    per_prefill_token_s=2.5e-5,
    per_decode_row_s=1e-5,
    per_context_token_s=2.9e-8,
    kv_bytes_per_s=3e11,
    num_blocks=26_000,
)
"""A model of eight billion parameters on an H200, from what single prompts and batches that decode took there."""


@pytest.mark.parametrize("rate", [44.0, 64.0])
def test_a_pair_keeps_as_many_promises_as_two_engines_that_do_both(rate: float) -> None:
    """Below what either can do, and above it: 2 s for the first token, 50 ms per token after it."""
    arrivals = [Arrival(r.arrival_s, r.num_prompt_tokens, r.num_output_tokens) for r in read_trace()]
    share = {}
    for roles in (("prefill", "decode"), ("unified", "unified")):
        traffic = Traffic(
            layout=tuple((f"{role}-{index}", role) for index, role in enumerate(roles)),
            device=MEASURED,
            scheduler=SchedulerConfig(max_num_requests=384, max_num_batched_tokens=4096),
        )
        share[roles[0]] = outcome(traffic.run(at_rate(arrivals[: int(4 * rate)], rate)), ttft_s=2.0, itl_s=0.05).goodput
    assert share["prefill"] >= share["unified"] > 0.7
