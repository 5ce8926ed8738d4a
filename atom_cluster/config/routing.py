"""How the router chooses a prefill and a decode replica."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atom_cluster.config.base import FrozenConfig


class RoutingConfig(FrozenConfig):
    """Routing policy. Costs are in tokens of prefill work, so that cache and load can be compared."""

    policy: Literal["prefix_and_load", "least_loaded", "round_robin"] = "prefix_and_load"
    """prefix_and_load: weigh cached blocks against load. least_loaded: ignore caches. round_robin: ignore both."""
    load_factor: float = Field(1.5, ge=1.0)
    """No replica with more than this times the mean load (plus one request) is chosen for its cache."""
    output_token_weight: float = Field(8.0, ge=0)
    """Cost of one running request on decode, in prefill tokens."""
    prefill_may_decode: bool = True
    """While no decode replica can take a request, a prefill replica serves all of it. Off: it waits for one."""
    load_period_s: float = Field(0.1, gt=0)
    """Engines report changed load at most this often."""
    query_timeout_s: float = Field(0.25, gt=0)
    """The ingress places by load alone when the router has not answered by then."""
    max_index_blocks: int = Field(4_000_000, ge=1)
    """Entries (replica, block) in the router's index; above it the oldest replica entries are dropped."""
