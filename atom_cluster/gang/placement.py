"""Where the ranks of a replica go: placement-group bundles, and which rank gets which bundle. Pure; knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from atom_cluster.config.parallel import ParallelConfig

HEAD_CPUS = 0.01
"""CPUs that the head actor asks for: next to nothing, but a bundle must not be empty."""
RANK_CPUS = 0.01
"""The same for a rank. Cores are shared out by thread counts, so that a laptop can run a whole cluster."""
_MAX_RANKS_PER_HOST = 8

Device = Literal["cpu", "cuda"]
Strategy = Literal["PACK", "STRICT_PACK"]


def world_size(parallel: ParallelConfig) -> int:
    """Ranks of one replica."""
    return parallel.tensor


def rank_resources(device: Device, extra: Mapping[str, float]) -> dict[str, float]:
    """Ray resources of one rank."""
    gpus = {"GPU": 1.0} if device == "cuda" else {}
    return {"CPU": RANK_CPUS, **gpus, **extra}


def bundles(
    parallel: ParallelConfig, device: Device, resources_per_rank: Mapping[str, float]
) -> list[dict[str, float]]:
    """Bundles of one replica: the head's, then one per rank."""
    ranks = [rank_resources(device, resources_per_rank) for _ in range(world_size(parallel))]
    return [{"CPU": HEAD_CPUS}, *ranks]


def strategy(parallel: ParallelConfig, device: Device) -> Strategy:
    """GPU ranks that fit on one host must be on one, for their links; anything else is packed as well as it goes."""
    fits_one_host = world_size(parallel) <= _MAX_RANKS_PER_HOST
    return "STRICT_PACK" if device == "cuda" and fits_one_host else "PACK"


def rank_bundles(bundle_nodes: Sequence[str]) -> list[int]:
    """The bundle index of each rank, from the node of every bundle, the head's included.

    Ranks of one node are adjacent. Rank 0 is on the head's node if any rank is, else on the node with the most ranks.
    """
    head_node, *rank_nodes = bundle_nodes
    indices_by_node: dict[str, list[int]] = {}
    for index, node in enumerate(rank_nodes, start=1):
        indices_by_node.setdefault(node, []).append(index)
    nodes = sorted(indices_by_node, key=lambda node: (node != head_node, -len(indices_by_node[node])))
    return [index for node in nodes for index in indices_by_node[node]]
