"""GangSpec: what a replica's head wants its gang to be. Plain values that Ray can carry; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from atom_cluster.gang.placement import Device
from atom_cluster.observability.logging import LogFormat
from atom_cluster.runner.options import RunnerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRanks:
    """Ranks that share a model."""

    options: RunnerOptions
    """Of every rank; `rank`, `world_size`, `init_method` and `host` are filled in by the gang."""
    num_ranks: int = 1
    factory: str = "atom_cluster.runner.build:build_model_runner"
    """`module:function` that makes a rank's `RankRunner` from its options, in the rank's own process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRank:
    """One rank without a model."""

    factory: str
    """`module:function` that makes a whole `StepRunner` from `argument`."""
    argument: object

    @property
    def num_ranks(self) -> int:
        """Always one."""
        return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GangSpec:
    """One gang: its ranks, the engine host in rank 0's process, and how long anything may take."""

    ranks: ModelRanks | SimulatedRank
    host_factory: str
    """`module:function` that makes an `EngineHost` from keyword arguments `runner` and `settings`."""
    host_settings: object
    name: str = "gang"
    """Of the replica, for log lines."""
    log_level: str = "INFO"
    """Least severe level that ranks log."""
    log_format: LogFormat = "text"
    """How they write it."""
    device: Device = "cpu"
    resources_per_rank: dict[str, float] = field(default_factory=dict)
    start_timeout_s: float = 600.0
    """From the first actor to the engine's member card."""
    ping_timeout_s: float = 10.0
    """A rank that does not answer a ping for this long counts as dead."""
    step_timeout_s: float = 300.0
    """A rank busy with one step for longer counts as stuck."""
    stop_timeout_s: float = 15.0
    """What is still there after this is killed."""
