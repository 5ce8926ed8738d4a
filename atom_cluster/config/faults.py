"""Faults on purpose, for `atom-cluster drill` and for trying out alerts. All are off unless configured."""

from __future__ import annotations

from pydantic import Field

from atom_cluster.config.base import FrozenConfig


class FaultsConfig(FrozenConfig):
    """What goes wrong between engines, and on the way to them. Never set this in a cluster that serves people."""

    corrupt_reads: float = Field(0.0, ge=0, le=1)
    """Share of KV reads of which one block arrives damaged."""
    delay_reads_s: float = Field(0.0, ge=0)
    """KV reads are reported as over this much later."""
    lose_messages: float = Field(0.0, ge=0, lt=1)
    """Share of control messages between engines that vanish."""
    repeat_messages: float = Field(0.0, ge=0, le=1)
    """Share of control messages between engines that are sent twice."""
    delay_messages_s: float = Field(0.0, ge=0)
    """Control messages between engines wait up to this long, each another time, and so may overtake each other."""
    line_delay_s: float = Field(0.0, ge=0)
    """Whatever goes to an engine over TCP, and back, arrives this much later at most, and half of it at least, through
    a relay in front of each of its listeners. KV does with `kv_transfer.transport: tcp` only."""
    line_mib_per_s: float | None = Field(None, gt=0)
    """What such a relay lets through in each direction."""
    seed: int = 0
    """What goes wrong when follows from this and from the order of events, but for relays' delays."""
