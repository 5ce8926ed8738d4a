"""Runs scenarios one after the other against a cluster, and says of each whether the promises held."""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from atom_cluster.errors import ConfigError
from atom_cluster.tools.drill.cluster import DrillError, RunningCluster, serve_run, with_args
from atom_cluster.tools.drill.load import Load, Outcome
from atom_cluster.tools.drill.processes import Process, Processes
from atom_cluster.tools.drill.scenarios import SCENARIOS, Scenario, chosen

_ENDING_TIMEOUT_S = 60.0
"""What is stopped and replaced has to be gone by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One scenario."""

    scenario: Scenario
    outcome: Outcome
    recovery_s: float
    """Until another process had taken the place and an answer went through; 0 where nothing was replaced."""
    num_leaked: int
    """Blocks, tickets and requests still held a minute after the last answer."""
    problem: str = ""
    """Why the scenario could not be finished."""
    left_behind: int = 0
    """Processes that were stopped, replaced, and not ended."""

    @property
    def holds(self) -> bool:
        """Whether every promise was kept."""
        outcome = self.outcome
        return not (
            self.problem
            or outcome.lost
            or outcome.wrong
            or self.num_leaked
            or self.left_behind
            or (outcome.broken and not self.scenario.may_break_streams)
        )


def drill(
    names: Sequence[str],
    *,
    url: str | None,
    config: Path | None,
    num_clients: int,
    output: Path | None,
    report: Callable[[str], None],
) -> bool:
    """Run scenarios; whether all promises held. Raises `ConfigError` for an unknown scenario or an unsuitable cluster.

    url: a cluster that runs, whose Ray this host belongs to; scenarios that need a configuration of their own are
    refused. config: of the clusters to start, otherwise. output: a file for the results as JSON.
    """
    try:
        scenarios = chosen(list(names))
    except KeyError as exc:
        known = ", ".join(["all", *(scenario.name for scenario in SCENARIOS)])
        raise ConfigError(f"there is no scenario {exc.args[0]!r}; there are {known}") from exc
    if url is not None and (special := [scenario.name for scenario in scenarios if scenario.needs]):
        raise ConfigError(
            f"--url: {', '.join(special)}: a cluster of their own has to be started for these, see --config"
        )
    results: list[Result] = []
    report(_HEADER)
    for needs, group in groupby(scenarios, key=lambda scenario: json.dumps(scenario.needs)):
        with _cluster(url, config, json.loads(needs)) as cluster:
            processes = Processes()
            load = Load(cluster, num_clients=num_clients)
            for scenario in group:
                results.append(_run(scenario, cluster, processes, load))
                report(_line(results[-1]))
                if output is not None:
                    # Each time: a drill takes long, and may be interrupted.
                    output.write_text(json.dumps([_as_json(result) for result in results], indent=1) + "\n")
    for result in results:
        for text in (result.problem, *result.outcome.lost[:3], *result.outcome.wrong[:3], *result.outcome.broken[:3]):
            if text:
                report(f"{result.scenario.name}: {text}")
    return all(result.holds for result in results)


@contextlib.contextmanager
def _cluster(url: str | None, config: Path | None, needs: dict[str, object]) -> Iterator[RunningCluster]:
    if url is not None:
        yield RunningCluster(url)
        return
    if config is None:
        raise ConfigError("give --url of a running cluster, or --config of one to start")
    with tempfile.TemporaryDirectory(prefix="atom-drill-") as directory:
        own = with_args(config, Path(directory) / "cluster.yaml", **needs)
        with serve_run(own, Path(directory)) as cluster:
            try:
                yield cluster
            finally:
                Processes.disconnect()


def _run(scenario: Scenario, cluster: RunningCluster, processes: Processes, load: Load) -> Result:
    victims: list[Process] = []
    recovery_s = 0.0

    def disturb() -> None:
        nonlocal recovery_s
        began_s = time.monotonic()
        victims.extend(scenario.disturb(cluster, processes))
        recovery_s = time.monotonic() - began_s if victims else 0.0

    outcome, problem, num_leaked = Outcome(), "", 0
    try:
        load.run_while(disturb, outcome)
        cluster.wait_until_idle()
    except DrillError as exc:
        problem = str(exc)
        with contextlib.suppress(DrillError):
            num_leaked = cluster.num_held()
    return Result(
        scenario=scenario,
        outcome=outcome,
        recovery_s=recovery_s,
        num_leaked=num_leaked,
        problem=problem,
        left_behind=sum(_is_left_behind(processes, victim) for victim in victims),
    )


def _is_left_behind(processes: Processes, victim: Process) -> bool:
    """Whether a process that was replaced is still there; it is then ended."""
    deadline_s = time.monotonic() + _ENDING_TIMEOUT_S
    while processes.exists(victim):
        if time.monotonic() > deadline_s:
            processes.send(victim, signal.SIGKILL)
            return True
        time.sleep(0.5)
    return False


_HEADER = (
    f"{'scenario':18} {'sent':>6} {'right':>6} {'lost':>5} {'wrong':>5} {'broken':>6} {'refused':>7} "
    f"{'leaked':>6} {'recovery':>9} {'longest':>8}"
)


def _line(result: Result) -> str:
    outcome = result.outcome
    return (
        f"{result.scenario.name:18} {outcome.num_sent:6d} {outcome.num_right:6d} {len(outcome.lost):5d} "
        f"{len(outcome.wrong):5d} {len(outcome.broken):6d} {outcome.num_refused:7d} {result.num_leaked:6d} "
        f"{result.recovery_s:7.1f} s {outcome.longest_s:6.1f} s  {'holds' if result.holds else 'BROKEN'}"
    )


def _as_json(result: Result) -> dict[str, object]:
    outcome = result.outcome
    return {
        "scenario": result.scenario.name,
        "what": result.scenario.what,
        "holds": result.holds,
        "sent": outcome.num_sent,
        "right": outcome.num_right,
        "lost": len(outcome.lost),
        "wrong": len(outcome.wrong),
        "broken": len(outcome.broken),
        "refused": outcome.num_refused,
        "leaked": result.num_leaked,
        "left_behind": result.left_behind,
        "recovery_s": result.recovery_s,
        "longest_s": outcome.longest_s,
        "problem": result.problem,
    }
