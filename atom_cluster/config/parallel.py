"""How the GPUs (or CPU processes) of one replica share the model, and how many replicas there are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from atom_cluster.config.base import FrozenConfig


class ParallelConfig(FrozenConfig):
    """Ranks of one replica."""

    tensor: int = Field(1, ge=1, le=64)
    """Ranks that split every layer's weights and KV heads."""
    expert: int = Field(1, ge=1, le=64)
    """Ranks that divide the experts of a mixture-of-experts model among them, each holding whole ones: all ranks, so
    the same number as `tensor`. 1: the ranks split every expert instead."""

    @model_validator(mode="after")
    def _expert_is_one_or_all(self) -> ParallelConfig:
        if self.expert not in (1, self.tensor):
            raise ValueError(f"`expert` is {self.expert}; it must be 1 or the same as `tensor`, which is {self.tensor}")
        return self


class AutoscalingConfig(FrozenConfig):
    """Replica count follows the number of requests that the engines report as running or waiting."""

    min_replicas: int = Field(1, ge=1)
    """Fewest replicas, also when nothing is asked."""
    max_replicas: int = Field(1, ge=1)
    """Most replicas."""
    target_requests: float = Field(32, gt=0)
    """Running plus waiting requests per replica to aim for."""
    upscale_delay_s: float = Field(10.0, ge=0)
    """Load must ask for more replicas for this long before any is added."""
    downscale_delay_s: float = Field(300.0, ge=0)
    """Load must ask for fewer replicas for this long before any is removed."""

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> AutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class GroupConfig(FrozenConfig):
    """One group of equal replicas: all prefill, all decode, or all unified."""

    replicas: int = Field(1, ge=1)
    """Number of replicas when `autoscaling` is absent."""
    autoscaling: AutoscalingConfig | None = None
    """Let the number of replicas follow the load."""
    parallel: ParallelConfig = ParallelConfig()
    """Ranks of one replica."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda also means ROCm, whose torch devices have the same name. auto: GPUs if Ray has any, else CPUs."""
    block_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Tokens per KV block of these replicas; null: `cache.block_size`. Of prefill's and decode's, one must be a
    multiple of the other."""
    memory_fraction: float = Field(0.88, gt=0, lt=1)
    """Share of a GPU's memory for weights, activations and KV cache together. Ignored on CPUs."""
    threads_per_rank: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Compute threads of one rank on CPUs. auto: the node's cores but one, which is for HTTP and
    scheduling, divided among the ranks of all groups."""
    resources_per_rank: dict[str, float] = {}
    """Extra Ray resources of each rank, for instance to pin a group to nodes: {"prefill": 1}."""

    @property
    def max_ranks(self) -> int:
        """Ranks of the whole group when it is scaled up as far as it may."""
        replicas = self.replicas if self.autoscaling is None else self.autoscaling.max_replicas
        return replicas * self.parallel.tensor
