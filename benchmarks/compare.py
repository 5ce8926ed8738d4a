"""Whether a run got worse than an earlier one: ATOM's rule, 5 % of throughput or 10 % of a latency.

    python -m benchmarks.compare before.json after.json

Files are results of `benchmarks.serving`, of `benchmarks.sweep`, or of ATOM's own client; runs of sweeps are paired by
concurrency and rate. The exit status is 1 if anything got worse by more than that, 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import METRICS
from benchmarks.result_file import OWN, read_runs

THROUGHPUTS = ("request_throughput", "request_goodput:", "output_throughput", "total_token_throughput")
STATISTICS = ("mean", "median", "p99")
SAME = ("model_id", "backend", "num_prompts", "request_rate", "burstiness", "max_concurrency")
_PER_REQUEST = ("total_input_tokens", "total_output_tokens")
_LIKE = 0.02
"""Share by which tokens per request, or their cached share, may differ in runs that are alike."""
_LEAST_MS = 0.05
"""Latencies that differ by less are taken as equal: a tenth of next to nothing is no regression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One figure of both runs."""

    run: str
    metric: str
    before: float
    after: float
    is_regression: bool

    @property
    def change(self) -> float:
        """Share of the earlier figure."""
        return self.after / self.before - 1 if self.before else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How much worse is too much, as shares."""

    throughput: float = 0.05
    latency: float = 0.10


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and say by the exit status."""
    args = parse_arguments(arguments)
    rule = Rule(throughput=args.max_throughput_loss / 100, latency=args.max_latency_growth / 100)
    try:
        before, after = read_runs(args.before), read_runs(args.after)
        found, notes = compare_runs(before, after, rule)
    except ValueError as exc:
        print(f"benchmarks.compare: {exc}", file=sys.stderr)
        return 2
    print(as_table(found))
    for note in notes:
        print(f"note: {note}")
    regressions = [one for one in found if one.is_regression]
    print(f"{len(regressions)} regressions" if regressions else "no regression")
    return 1 if regressions else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--max-throughput-loss", type=float, default=5.0, help="percent")
    parser.add_argument("--max-latency-growth", type=float, default=10.0, help="percent")
    return parser.parse_args(arguments)


def compare_runs(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], rule: Rule
) -> tuple[list[Difference], list[str]]:
    """Differences of all figures that both have, and what may make them misleading.

    Raises ValueError when no run of one side is like any of the other, or has no figure that the other has.
    """
    if len(before) == len(after) == 1:
        pairs, notes = [(before[0], after[0])], []
    else:
        later = {_key(run): run for run in after}
        pairs = [(run, later[_key(run)]) for run in before if _key(run) in later]
        notes = [f"{_name(run)} is only in the first file" for run in before if _key(run) not in later]
        earlier = {_key(run) for run in before}
        notes += [f"{_name(run)} is only in the second file" for run in after if _key(run) not in earlier]
    if not pairs:
        raise ValueError("no run of one file has the concurrency and rate of one of the other")
    found: list[Difference] = []
    for old, new in pairs:
        differences = _differences(old, new, rule)
        if not differences:
            raise ValueError(f"{_name(old)}: the files have no figure in common")
        found += differences
        notes += _notes(old, new)
    return found, notes


def _key(run: Mapping[str, Any]) -> tuple[str, str]:
    return str(run.get("max_concurrency")), str(run.get("request_rate"))


def _name(run: Mapping[str, Any]) -> str:
    concurrency, rate = _key(run)
    return (
        f"rate {rate}" if concurrency == "None" else f"c{concurrency}" if rate == "inf" else f"c{concurrency} {rate}/s"
    )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], rule: Rule) -> list[Difference]:
    found = []
    for metric in THROUGHPUTS:
        if old.get(metric) and new.get(metric) is not None:
            worse = new[metric] < old[metric] * (1 - rule.throughput)
            found.append(_difference(old, new, metric, is_regression=worse))
    for metric in (f"{statistic}_{name}_ms" for name in METRICS for statistic in STATISTICS):
        if old.get(metric) is not None and new.get(metric) is not None:
            growth = new[metric] - old[metric]
            worse = growth > max(_LEAST_MS, old[metric] * rule.latency)
            found.append(_difference(old, new, metric, is_regression=worse))
    return found


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], metric: str, *, is_regression: bool) -> Difference:
    before, after = float(old[metric]), float(new[metric])
    return Difference(run=_name(old), metric=metric, before=before, after=after, is_regression=is_regression)


def _notes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{_name(old)}: {name} was {old.get(name)}, is {new.get(name)}"
        for name in SAME
        if old.get(name) != new.get(name)
    ]
    for name in _PER_REQUEST:
        was, now = (run.get(name, 0) / max(1, run.get("completed", 0)) for run in (old, new))
        if abs(now - was) > _LIKE * was:
            notes.append(f"{_name(old)}: {name} was {was:.1f} per request, is {now:.1f}")
    was, now = map(_cached_share, (old, new))
    if was is not None and now is not None and abs(now - was) > _LIKE:
        notes.append(f"{_name(old)}: {was:.0%} of the prompts' tokens were cached, now {now:.0%} are")
    for which, run in (("first", old), ("second", new)):
        if run.get("completed", 0) < run.get("num_prompts", 0):
            notes.append(f"{_name(run)}: {run['num_prompts'] - run['completed']} requests of the {which} file failed")
        if run.get(OWN, {}).get("client", {}).get("is_bottleneck"):
            notes.append(f"{_name(run)}: the client of the {which} file did not keep up")
    return notes


def _cached_share(run: Mapping[str, Any]) -> float | None:
    """Of the prompts' tokens; None: the client did not say."""
    num_cached = run.get(OWN, {}).get("total_cached_tokens")
    return None if num_cached is None else float(num_cached / max(1, run["total_input_tokens"]))


def as_table(found: Sequence[Difference]) -> str:
    """For people."""
    lines = [f"{'run':12}{'metric':26}{'before':>14}{'after':>14}{'change':>10}"]
    for one in found:
        mark = "  WORSE" if one.is_regression else ""
        lines.append(f"{one.run:12}{one.metric:26}{one.before:14.3f}{one.after:14.3f}{one.change:+10.1%}{mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
