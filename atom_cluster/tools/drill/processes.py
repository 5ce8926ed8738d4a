"""Processes of a running cluster, wherever they are, and signals to them, through Ray. Knows no scenarios."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors

_RANK_CLASS = "Worker"
_REPLICA_CLASS = "ServeReplica:atom:{deployment}"
"""All files in configs/ call the application atom."""
_MAX_ACTORS = 10_000
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Process:
    """One process of an actor."""

    node_id: str
    pid: int


class Processes:
    """The actors of the Ray cluster that this process is connected to."""

    def __init__(self, ray_address: str) -> None:
        """Connects to the Ray cluster unless there is a connection already."""
        if not ray.is_initialized():
            ray.init(address=ray_address, namespace="atom-drill", log_to_driver=False, logging_level="warning")
        self._own_node = ray.get_runtime_context().get_node_id()
        self.host: str = ray.util.get_node_ip_address()
        """This node's address in the cluster."""

    @staticmethod
    def disconnect() -> None:
        """From the Ray cluster, which is about to end."""
        ray.shutdown()

    def of_deployment(self, name: str) -> list[Process]:
        """Replicas of a Serve deployment, such as Router or Ingress; for engines, their heads."""
        return self._of_class(_REPLICA_CLASS.format(deployment=name))

    def ranks(self) -> list[Process]:
        """Every rank of every gang."""
        return self._of_class(_RANK_CLASS)

    def send(self, process: Process, number: int) -> None:
        """A signal; 0 only asks. Raises ProcessLookupError when there is no such process any more."""
        if process.node_id == self._own_node:
            os.kill(process.pid, number)
            return
        place = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
        task = ray.remote(os.kill).options(num_cpus=0, scheduling_strategy=place)
        ray.get(task.remote(process.pid, number), timeout=_TIMEOUT_S)

    def exists(self, process: Process) -> bool:
        """Whether it is still there, running, stopped, or ended and not yet collected by its parent."""
        try:
            self.send(process, 0)
        except ProcessLookupError:
            return False
        return True

    def _of_class(self, name: str) -> list[Process]:
        actors = list_actors(
            filters=[("state", "=", "ALIVE"), ("class_name", "=", name)], limit=_MAX_ACTORS, timeout=int(_TIMEOUT_S)
        )
        return [Process(str(actor.node_id), int(actor.pid)) for actor in actors if actor.pid]
