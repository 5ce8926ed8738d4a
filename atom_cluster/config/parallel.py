"""How the GPUs (or CPU processes) of one replica share the model, and how many replicas there are."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atom_cluster.config.base import FrozenConfig


class ParallelConfig(FrozenConfig):
    """Ranks of one replica."""

    tensor: int = Field(1, ge=1, le=64)
    """Ranks that split every layer's weights and KV heads."""


class AutoscalingConfig(FrozenConfig):
    """Replica count follows the number of requests that the engines report as running or waiting."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_requests: float = Field(32, gt=0)
    """Running plus waiting requests per replica to aim for."""
    upscale_delay_s: float = Field(10.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)


class GroupConfig(FrozenConfig):
    """One group of equal replicas: all prefill, all decode, or all unified."""

    replicas: int = Field(1, ge=1)
    """Number of replicas when `autoscaling` is absent."""
    autoscaling: AutoscalingConfig | None = None
    parallel: ParallelConfig = ParallelConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda also means ROCm, whose torch devices have the same name. auto: GPUs if Ray has any, else CPUs."""
    memory_fraction: float = Field(0.88, gt=0, lt=1)
    """Share of a GPU's memory for weights, activations and KV cache together. Ignored on CPUs."""
    threads_per_rank: int | Literal["auto"] = Field("auto", ge=1)
    """Compute threads of one rank on CPUs. auto: the node's cores divided among the ranks of all groups."""
    resources_per_rank: dict[str, float] = {}
    """Extra Ray resources of each rank, for instance to pin a group to nodes: {"prefill": 1}."""
