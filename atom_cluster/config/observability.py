"""Logs and metrics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atom_cluster.config.base import FrozenConfig


class ProfileConfig(FrozenConfig):
    """Traces of single steps, recorded while somebody asks for them; see docs/profiling.md."""

    directory: str | None = None
    """Where every rank writes its traces, on its own host. null: nobody can record any."""
    with_stack: bool = False
    """Record where in the Python code each op was called, which slows steps down a lot."""
    record_shapes: bool = False
    """Record the shapes of each op's inputs."""
    max_steps: int = Field(default=256, ge=1, le=100_000)
    """A window that nobody stops ends after so many steps. A step of a large model adds up to some MB to a trace."""


class ObservabilityConfig(FrozenConfig):
    """What is recorded."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe level that is logged."""
    metrics_period_s: float = Field(1.0, gt=0)
    """How often engines export gauges."""
    profile: ProfileConfig = ProfileConfig()
    """Traces of single steps, on demand."""
