"""Runs scenarios one after the other against a cluster, and says of each whether the promises held."""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from atom_cluster.errors import ConfigError
from atom_cluster.serving.secret import cluster_secret
from atom_cluster.tools.drill import cancel
from atom_cluster.tools.drill.cluster import DrillError, RunningCluster, serve_run, with_args
from atom_cluster.tools.drill.load import Load, Outcome
from atom_cluster.tools.drill.processes import Process, Processes
from atom_cluster.tools.drill.record import Record
from atom_cluster.tools.drill.scenarios import SCENARIOS, Scenario, Scene, chosen
from atom_cluster.tools.drill.watch import EngineWatch

_ALWAYS: dict[str, dict[str, object]] = {
    "kv_transfer": {"conditional_prefill": False},
    "cache": {"prefix_caching": False},
}
"""Of clusters that a drill starts: every prompt goes to prefill, or faults between engines would hurt nobody."""
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
    notes: Mapping[str, float] = field(default_factory=dict)
    """What else is worth telling."""

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
            or (outcome.num_refused and not self.scenario.may_refuse)
        )


CANCEL = "cancel"
"""Beside the scenarios: how soon engines are free of requests whose clients leave."""


def drill(
    names: Sequence[str],
    *,
    url: str | None,
    config: Path | None,
    api_key: str | None = None,
    num_clients: int,
    num_samples: int,
    output: Path | None,
    report: Callable[[str], None],
) -> bool:
    """Run scenarios; whether all promises held. Raises `ConfigError` for an unknown scenario or an unsuitable cluster.

    url: a cluster that runs, whose Ray this host belongs to; scenarios that need a configuration of their own are
    refused. config: of the clusters to start, otherwise. api_key: an admin's, where clusters want one. num_samples: of
    `cancel`, for each phase, streaming and not. output: a file for the results as JSON.
    """
    does_cancel = CANCEL in names or list(names) == ["all"]
    try:
        scenarios = chosen([name for name in names if name != CANCEL])
    except KeyError as exc:
        known = ", ".join(["all", *(scenario.name for scenario in SCENARIOS), CANCEL])
        raise ConfigError(f"there is no scenario {exc.args[0]!r}; there are {known}") from exc
    special = [scenario.name for scenario in scenarios if scenario.needs] + [CANCEL] * does_cancel
    if url is not None and special:
        raise ConfigError(
            f"--url: {', '.join(special)}: a cluster of their own has to be started for these, see --config"
        )
    record = Record(output, names=names, num_clients=num_clients)
    clusters = _Clusters(url, config, api_key)
    holds = _run_scenarios(scenarios, clusters, num_clients=num_clients, record=record, report=report)
    if does_cancel:
        holds = _run_cancel(clusters, num_samples=num_samples, record=record, report=report) and holds
    return holds


def _run_scenarios(
    scenarios: Sequence[Scenario],
    clusters: _Clusters,
    *,
    num_clients: int,
    record: Record,
    report: Callable[[str], None],
) -> bool:
    results: list[Result] = []
    if scenarios:
        report(_HEADER)
    for needs, group in groupby(scenarios, key=lambda scenario: json.dumps(scenario.needs)):
        with clusters.with_needs(json.loads(needs)) as cluster, _connected(cluster) as scene:
            load = Load(cluster, num_clients=num_clients)
            for scenario in group:
                results.append(_run(scenario, scene, load))
                report(_line(results[-1]))
                record.add("scenarios", _as_json(results[-1]))
    for result in results:
        if result.notes:
            report(f"{result.scenario.name}: " + ", ".join(f"{name} {value}" for name, value in result.notes.items()))
        for text in (result.problem, *result.outcome.lost[:3], *result.outcome.wrong[:3], *result.outcome.broken[:3]):
            if text:
                report(f"{result.scenario.name}: {text}")
    return all(result.holds for result in results)


def _run_cancel(clusters: _Clusters, *, num_samples: int, record: Record, report: Callable[[str], None]) -> bool:
    holds = True
    report(cancel.HEADER)
    with clusters.with_needs(cancel.NEEDS) as cluster, _connected(cluster) as scene:
        canceller = cancel.Canceller(cluster, scene.watch)
        for phase in cancel.PHASES:
            for is_streaming in (True, False):
                times = canceller.times(phase, is_streaming=is_streaming, num_samples=num_samples)
                holds = holds and times.holds
                report(cancel.line_of(times))
                record.add("cancel", cancel.as_json(times))
    return holds


@dataclass(frozen=True, slots=True)
class _Clusters:
    """Where the clusters of a drill are, or are to come from, and the key that opens them."""

    url: str | None
    config: Path | None
    api_key: str | None = field(default=None, repr=False)

    @contextlib.contextmanager
    def with_needs(self, needs: dict[str, Any]) -> Iterator[RunningCluster]:
        """The one that runs, or one with these parts of its configuration."""
        if self.url is not None:
            yield RunningCluster(self.url, api_key=self.api_key)
            return
        if self.config is None:
            raise ConfigError("give --url of a running cluster, or --config of one to start")
        with tempfile.TemporaryDirectory(prefix="atom-drill-") as directory:
            always = {name: {**section, **needs.get(name, {})} for name, section in _ALWAYS.items()}
            own = with_args(self.config, Path(directory) / "cluster.yaml", **(needs | always))
            with serve_run(own, Path(directory), api_key=self.api_key) as cluster:
                yield cluster


@contextlib.contextmanager
def _connected(cluster: RunningCluster) -> Iterator[Scene]:
    """A scene, with connections to the cluster's Ray and to its engines."""
    processes = Processes(cluster.ray_address)
    try:
        secret = cluster_secret()
        watch = EngineWatch(secret=secret, host=processes.host)
        try:
            yield Scene(cluster, processes, watch, secret)
        finally:
            watch.close()
    finally:
        Processes.disconnect()


def _run(scenario: Scenario, scene: Scene, load: Load) -> Result:
    scene.notes = {}
    victims: list[Process] = []
    recovery_s = 0.0

    def disturb() -> None:
        nonlocal recovery_s
        began_s = time.monotonic()
        victims.extend(scenario.disturb(scene))
        recovery_s = time.monotonic() - began_s if victims else 0.0

    outcome, problem, num_leaked = Outcome(), "", 0
    try:
        load.run_while(disturb, outcome)
    except DrillError as exc:
        problem = str(exc)
    # Also when something went wrong: what is still queued then is not leaked.
    try:
        scene.cluster.wait_until_idle()
    except DrillError as exc:
        problem = problem or str(exc)
        with contextlib.suppress(DrillError):
            num_leaked = scene.cluster.num_held()
    return Result(
        scenario=scenario,
        outcome=outcome,
        recovery_s=recovery_s,
        num_leaked=num_leaked,
        problem=problem,
        left_behind=sum(_is_left_behind(scene.processes, victim) for victim in victims),
        notes=scene.notes,
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
        **({"notes": dict(result.notes)} if result.notes else {}),
    }
