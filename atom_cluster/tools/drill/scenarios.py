"""What a drill does to a cluster: which fault, under which configuration, and what is promised meanwhile."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from atom_cluster.tools.drill.cluster import RunningCluster
from atom_cluster.tools.drill.flood import NEEDS as FLOOD_NEEDS
from atom_cluster.tools.drill.flood import flood
from atom_cluster.tools.drill.processes import Process, Processes
from atom_cluster.tools.drill.siege import besiege
from atom_cluster.tools.drill.upgrade import NEEDS as UPGRADE_NEEDS
from atom_cluster.tools.drill.upgrade import upgrade
from atom_cluster.tools.drill.watch import EngineWatch

RECOVERY_TIMEOUT_S = 150.0


@dataclass(slots=True)
class Scene:
    """What a scenario works with."""

    cluster: RunningCluster
    processes: Processes
    watch: EngineWatch
    secret: bytes = field(repr=False)
    """The cluster's."""
    notes: dict[str, float] = field(default_factory=dict)
    """What else is worth telling of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One fault."""

    name: str
    what: str
    disturb: Callable[[Scene], list[Process]]
    """Does it, and returns when the cluster is whole again; the processes it was done to."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    """Parts of the configuration that a cluster must be started with; nothing: any cluster will do."""
    may_break_streams: bool = False
    """Answers that pass through the process that dies break; nobody else holds their connections."""
    may_refuse: bool = True
    """Whether clients may have to ask again."""


def _engine(role: str, number: signal.Signals) -> Callable[[Scene], list[Process]]:
    """To rank 0 of an engine of a role."""

    def disturb(scene: Scene) -> list[Process]:
        cluster, processes = scene.cluster, scene.processes
        before = cluster.replicas()
        pid = next(replica["pid"] for replica in before if replica["role"] == role)
        victim = next(rank for rank in processes.ranks() if rank.pid == pid)
        processes.send(victim, number)
        _wait_until_replaced(cluster, before)
        return [victim]

    return disturb


def _follower(number: signal.Signals) -> Callable[[Scene], list[Process]]:
    """To a rank of some engine's gang that is not the first."""

    def disturb(scene: Scene) -> list[Process]:
        cluster, processes = scene.cluster, scene.processes
        before = cluster.replicas()
        firsts = {replica["pid"] for replica in before}
        victim = next(rank for rank in processes.ranks() if rank.pid not in firsts)
        processes.send(victim, number)
        _wait_until_replaced(cluster, before)
        return [victim]

    return disturb


def _router(number: signal.Signals) -> Callable[[Scene], list[Process]]:
    def disturb(scene: Scene) -> list[Process]:
        cluster, processes = scene.cluster, scene.processes
        before = cluster.page()["router"]["peer_id"]
        (victim,) = processes.of_deployment("Router")
        processes.send(victim, number)
        cluster.wait_until(
            lambda: (cluster.page()["router"] or {"peer_id": before})["peer_id"] != before,
            what="another router",
            timeout_s=RECOVERY_TIMEOUT_S,
        )
        return [victim]

    return disturb


def _ingress(number: signal.Signals) -> Callable[[Scene], list[Process]]:
    def disturb(scene: Scene) -> list[Process]:
        cluster, processes = scene.cluster, scene.processes
        before = {ingress["id"] for ingress in cluster.page()["ingresses"]}
        victim = processes.of_deployment("Ingress")[0]
        processes.send(victim, number)
        cluster.wait_until(
            lambda: any(ingress["id"] not in before for ingress in cluster.page()["ingresses"]),
            what="another ingress",
            timeout_s=RECOVERY_TIMEOUT_S,
        )
        return [victim]

    return disturb


def _until_counted(metric: str, **labels: str) -> Callable[[Scene], list[Process]]:
    """The configuration disturbs enough; this waits until engines say that it did, or that they work in spite of it."""

    def disturb(scene: Scene) -> list[Process]:
        cluster = scene.cluster
        cluster.wait_until(
            lambda: cluster.metric(metric, **labels) > 0,
            what=f"{metric} counts {labels or ''}".rstrip(),
            timeout_s=RECOVERY_TIMEOUT_S,
        )
        scene.notes[metric] = cluster.metric(metric, **labels)
        return []

    return disturb


def _upgrade(scene: Scene) -> list[Process]:
    """Another version takes the place of this one, replica by replica."""
    scene.notes |= upgrade(scene.cluster, scene.watch)
    return []


def _flood(scene: Scene) -> list[Process]:
    """More connections at once than the cluster's queues hold."""
    scene.notes |= flood(scene.cluster)
    return []


def _hostile_peers(scene: Scene) -> list[Process]:
    """All attacks on all listeners."""
    pids = {int(process["pid"]) for process in (*scene.cluster.replicas(), *scene.cluster.page()["ingresses"])}
    pids |= {process.pid for process in scene.processes.of_deployment("Router")}
    scene.notes |= besiege(scene.cluster, pids, scene.secret)
    return []


def _wait_until_replaced(cluster: RunningCluster, before: list[dict[str, Any]]) -> None:
    """Until one engine is another than before, all roles are there, and a generation goes through."""
    old = {replica["id"] for replica in before}
    roles = sorted(replica["role"] for replica in before)

    def is_whole() -> bool:
        now = cluster.replicas()
        has_new = any(replica["id"] not in old for replica in now)
        return has_new and sorted(replica["role"] for replica in now) == roles

    cluster.wait_until(is_whole, what="another engine", timeout_s=RECOVERY_TIMEOUT_S)
    cluster.wait_until(cluster.is_ready, what="/ready", timeout_s=RECOVERY_TIMEOUT_S)


_GANG = {"prefill": {"parallel": {"tensor": 3}}, "decode": {"parallel": {"tensor": 3}}}
"""The model of the quick start has 9 heads and 3 KV heads."""
_ALL_REMOTE = {"conditional_prefill": False}
"""What is to go wrong between two engines would else be avoided: slow handoffs make prompts stay at decode."""
_SHORT_WAITS = {"prefill_timeout_s": 3.0, "lease_s": 3.0}


def _signalled(verb: str, number: signal.Signals) -> tuple[Scenario, ...]:
    """What a signal does to each kind of process."""
    return (
        Scenario(
            name=f"prefill-{verb}", what=f"{number.name} of the only prefill engine", disturb=_engine("prefill", number)
        ),
        Scenario(
            name=f"decode-{verb}", what=f"{number.name} of the only decode engine", disturb=_engine("decode", number)
        ),
        Scenario(name=f"router-{verb}", what=f"{number.name} of the router", disturb=_router(number)),
        Scenario(
            name=f"ingress-{verb}",
            what=f"{number.name} of an ingress",
            disturb=_ingress(number),
            may_break_streams=True,
        ),
        Scenario(
            name=f"rank-{verb}",
            what=f"{number.name} of one rank of a gang",
            disturb=_follower(number),
            needs=_GANG,
        ),
    )


_SIGNALLED = (*_signalled("killed", signal.SIGKILL), *_signalled("stopped", signal.SIGSTOP))

SCENARIOS = (
    # Those that any cluster will do for come first, so that they share one.
    *sorted(_SIGNALLED, key=lambda scenario: bool(scenario.needs)),
    Scenario(
        name="blocks-corrupted",
        what="one of four reads brings a damaged block",
        disturb=_until_counted("atom_kv_bad_blocks_total"),
        needs={"faults": {"corrupt_reads": 0.25}, "kv_transfer": _ALL_REMOTE},
    ),
    Scenario(
        name="messages-lost",
        what="one of twenty messages between prefill and decode vanishes",
        disturb=_until_counted("atom_kv_transfer_failures_total"),
        needs={"faults": {"lose_messages": 0.05}, "kv_transfer": {**_ALL_REMOTE, **_SHORT_WAITS}},
    ),
    Scenario(
        name="messages-repeated",
        what="one of five messages between prefill and decode comes twice",
        disturb=_until_counted("atom_kv_reads_total", outcome="ok"),
        needs={"faults": {"repeat_messages": 0.2}, "kv_transfer": _ALL_REMOTE},
    ),
    Scenario(
        name="messages-late",
        what="messages between prefill and decode take up to 0.3 s, reads half a second longer",
        disturb=_until_counted("atom_kv_reads_total", outcome="ok"),
        needs={"faults": {"delay_messages_s": 0.3, "delay_reads_s": 0.5}, "kv_transfer": _ALL_REMOTE},
    ),
    Scenario(
        name="network-slow",
        what="whatever engines send and get passes relays: up to 0.2 s later each way, 16 MiB/s",
        disturb=_until_counted("atom_kv_reads_total", outcome="ok", transport="tcp"),
        needs={
            "faults": {"line_delay_s": 0.2, "line_mib_per_s": 16.0},
            "kv_transfer": {"transport": "tcp", **_ALL_REMOTE},
        },
    ),
    Scenario(
        name="hostile-peers",
        what="noise, halves, flipped bytes, wrong secrets, giants and silence at every listener",
        disturb=_hostile_peers,
        needs={"kv_transfer": {"transport": "tcp", **_ALL_REMOTE}},
        may_refuse=False,
    ),
    Scenario(
        name="flood",
        what="500 connections at once to queues of 64: whoever is not served is told when to come back",
        disturb=_flood,
        needs=FLOOD_NEEDS,
    ),
    Scenario(
        name="rolling-upgrade",
        what="another version is deployed: its blocks mean something else",
        disturb=_upgrade,
        needs=UPGRADE_NEEDS,
        may_refuse=False,
    ),
)


def chosen(names: list[str]) -> list[Scenario]:
    """By name; `all` are all. Raises KeyError for another one."""
    by_name = {scenario.name: scenario for scenario in SCENARIOS}
    return list(SCENARIOS) if names == ["all"] else [by_name[name] for name in names]
