"""What a rank found out while it started, in numbers."""

from __future__ import annotations

from msgspec import Struct


class StartFacts(Struct, frozen=True, kw_only=True):
    """Of one rank. Zeros where there is nothing of the kind."""

    weight_bytes: int = 0
    kv_bytes: int = 0
    """Pages of all cache groups."""
    graph_bytes: int = 0
    """Device memory that capturing took."""
    num_graphs: int = 0
    """Sizes of decode steps that were captured."""
    num_pieces: int = 0
    """Sizes of steps with prompts that were captured in pieces."""
    capture_s: float = 0.0
    parts_s: dict[str, float] = {}
    """Seconds by part of the start: join, load, compile, cache, capture, warm up."""
