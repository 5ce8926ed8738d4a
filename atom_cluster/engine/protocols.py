"""The two seams of an engine: `StepRunner` (below: what computes a step) and `Outbox` (above: where messages go).

An engine cannot tell a simulated device from a local one or from sixteen ranks, nor a ZMQ socket from a list in a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.messages.cluster import CacheEvents, CacheSnapshot, PeerAddress, ReplicaLoad
from atom_cluster.messages.profile import ProfileAnswer, StartProfile, StopProfile
from atom_cluster.messages.requests import CancelRequest, EngineRequest, TokenBatch
from atom_cluster.messages.start import StartFacts
from atom_cluster.messages.steps import StepPlan, StepResult
from atom_cluster.messages.transfer import (
    KvOffer,
    KvPublication,
    PrefillAccepted,
    PrefillFailed,
    PrefillOrder,
    Report,
    TicketRelease,
    TicketRenew,
)

ROUTER = "router"
"""Destination of cache events and load, whichever router is current; dropped while there is none."""

EngineInput = (
    EngineRequest
    | CancelRequest
    | PrefillOrder
    | PrefillAccepted
    | KvPublication
    | PrefillFailed
    | TicketRenew
    | TicketRelease
    | StartProfile
    | StopProfile
)
"""What an engine accepts from others."""

EngineOutput = (
    TokenBatch
    | PrefillOrder
    | PrefillAccepted
    | KvPublication
    | PrefillFailed
    | TicketRenew
    | TicketRelease
    | CacheEvents
    | CacheSnapshot
    | ReplicaLoad
    | ProfileAnswer
)
"""What an engine sends to others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInfo:
    """What a runner turned out to be once its model was loaded and its KV memory allocated."""

    num_blocks: int
    """Pages of the first cache group."""
    block_size: int
    """Tokens per block."""
    max_num_requests: int
    """Rows, `0 <= row < max_num_requests`."""
    max_model_len: int
    vocab_size: int
    world_size: int = 1
    other_groups: tuple[PageGroup, ...] = ()
    """Pages of the cache groups behind the first."""
    max_drafts: int = 0
    """Tokens that the runner drafts behind each sampled one."""
    kv_offers: tuple[KvOffer, ...] = ()
    """How other engines can read this one's KV memory; empty when they cannot."""
    kv_transports: tuple[str, ...] = ()
    """Transports this runner can read through, best first."""
    fingerprint_fields: dict[str, str] = field(default_factory=dict)
    """Everything that must be equal for another engine's blocks to mean the same here."""
    choices: dict[str, str] = field(default_factory=dict)
    """What was chosen automatically and why, for the start-up log and /v1/cluster."""
    start: StartFacts = StartFacts()
    """Of rank 0."""
    profile_refusal: str = "this engine records no traces"
    """Why the runner takes no window commands; empty when it does."""

    @property
    def max_request_tokens(self) -> int:
        """Tokens of one request that the KV cache has room for, with those that drafting writes behind them."""
        return self.num_blocks * self.block_size - max(0, self.max_drafts - 1)


class StepRunner(Protocol):
    """Executes step plans in order. Called from the engine's thread only. Owns model, KV memory and transports.

    Errors of a step (a dead rank, out of memory) are raised by `collect`; the runner is unusable afterwards.
    """

    @property
    def info(self) -> RunnerInfo:
        """Constant over the runner's life."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan; returns before it has run. At most two plans are in flight at any time."""
        ...

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """The result of the oldest plan in flight; None if it was not ready within `timeout_s`."""
        ...

    def poll_kv(self) -> Sequence[Report]:
        """Reports of KV commands, profiler windows and compilations of grammars that ended since the last call,
        combined over ranks. Never blocks."""
        ...

    def close(self) -> None:
        """Free everything; idempotent. Reads under way are abandoned."""
        ...


class Outbox(Protocol):
    """Where an engine's messages go. Called from the engine's thread; never blocks; may drop for a lost peer."""

    def send(self, destination: str | PeerAddress, message: EngineOutput) -> None:
        """Send to whoever is known by this id (it spoke to us first), to `ROUTER`, or to an address."""
        ...
