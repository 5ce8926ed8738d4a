"""What a drill does to a cluster: which fault, under which configuration, and what is promised meanwhile."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from atom_cluster.tools.drill.cluster import RunningCluster
from atom_cluster.tools.drill.processes import Process, Processes

RECOVERY_TIMEOUT_S = 150.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One fault."""

    name: str
    what: str
    disturb: Callable[[RunningCluster, Processes], list[Process]]
    """Does it, and returns when the cluster is whole again; the processes it was done to."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    """Parts of the configuration that a cluster must be started with; nothing: any cluster will do."""
    may_break_streams: bool = False
    """Answers that pass through the process that dies break; nobody else holds their connections."""


def _engine(role: str, number: signal.Signals) -> Callable[[RunningCluster, Processes], list[Process]]:
    """To rank 0 of an engine of a role."""

    def disturb(cluster: RunningCluster, processes: Processes) -> list[Process]:
        before = cluster.replicas()
        pid = next(replica["pid"] for replica in before if replica["role"] == role)
        victim = next(rank for rank in processes.ranks() if rank.pid == pid)
        processes.send(victim, number)
        _wait_until_replaced(cluster, before)
        return [victim]

    return disturb


def _follower(number: signal.Signals) -> Callable[[RunningCluster, Processes], list[Process]]:
    """To a rank of some engine's gang that is not the first."""

    def disturb(cluster: RunningCluster, processes: Processes) -> list[Process]:
        before = cluster.replicas()
        firsts = {replica["pid"] for replica in before}
        victim = next(rank for rank in processes.ranks() if rank.pid not in firsts)
        processes.send(victim, number)
        _wait_until_replaced(cluster, before)
        return [victim]

    return disturb


def _router(number: signal.Signals) -> Callable[[RunningCluster, Processes], list[Process]]:
    def disturb(cluster: RunningCluster, processes: Processes) -> list[Process]:
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


def _ingress(number: signal.Signals) -> Callable[[RunningCluster, Processes], list[Process]]:
    def disturb(cluster: RunningCluster, processes: Processes) -> list[Process]:
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


def _nothing(cluster: RunningCluster, processes: Processes) -> list[Process]:
    """The configuration disturbs enough."""
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
        disturb=_nothing,
        needs={"faults": {"corrupt_reads": 0.25}},
    ),
    Scenario(
        name="messages-lost",
        what="one of twenty messages between prefill and decode vanishes",
        disturb=_nothing,
        needs={"faults": {"lose_messages": 0.05}, "kv_transfer": _SHORT_WAITS},
    ),
    Scenario(
        name="messages-repeated",
        what="one of five messages between prefill and decode comes twice",
        disturb=_nothing,
        needs={"faults": {"repeat_messages": 0.2}},
    ),
    Scenario(
        name="network-slow",
        what="messages between prefill and decode take up to 0.3 s, reads half a second longer",
        disturb=_nothing,
        needs={"faults": {"delay_messages_s": 0.3, "delay_reads_s": 0.5}},
    ),
)


def chosen(names: list[str]) -> list[Scenario]:
    """By name; `all` are all. Raises KeyError for another one."""
    by_name = {scenario.name: scenario for scenario in SCENARIOS}
    return list(SCENARIOS) if names == ["all"] else [by_name[name] for name in names]
