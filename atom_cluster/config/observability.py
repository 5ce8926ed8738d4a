"""Logs and metrics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atom_cluster.config.base import FrozenConfig


class ObservabilityConfig(FrozenConfig):
    """What is recorded."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe level that is logged."""
    metrics_period_s: float = Field(1.0, gt=0)
    """How often engines export gauges."""
