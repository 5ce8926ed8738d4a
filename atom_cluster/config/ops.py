"""Which implementation each op uses."""

from __future__ import annotations

from typing import Literal

from atom_cluster.config.base import FrozenConfig


class OpsConfig(FrozenConfig):
    """Op backends. auto picks the fastest that the platform has, and says which and why."""

    backend: Literal["auto", "torch", "cpu", "triton"] = "auto"
    """torch: reference implementations, any device. cpu: packed half-precision weights with float32 arithmetic. triton:
    our kernels, on GPUs."""
