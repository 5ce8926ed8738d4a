"""PlatformFacts of the Ray cluster that this process is connected to."""

from __future__ import annotations

import dataclasses

import ray

from atom_cluster.config.facts import PlatformFacts
from atom_cluster.platform.facts import local_platform_facts


def cluster_facts() -> PlatformFacts:
    """This machine's facts with the whole cluster's GPUs. GPUs are of one vendor; a mixed cluster is not supported."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    local = local_platform_facts(is_single_host=len(nodes) == 1)
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    return dataclasses.replace(local, num_gpus=num_gpus)
