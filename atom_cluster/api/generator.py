"""Generator: what the HTTP routes need from the cluster behind them.

The serving layer implements it; tests use a fake.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from atom_cluster.api.operating.profile_types import ProfileRequest, ProfileTarget
from atom_cluster.messages.requests import SamplingParams, TokenDelta
from atom_cluster.observability.timeline import OutputRecord
from atom_cluster.units import Deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateInput:
    """One output to be generated: a single prompt, n == 1, every automatic value resolved."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    """Lower runs first."""
    deadline: Deadline | None = None
    """When its client stops waiting; None: as long as the configuration allows."""
    record: OutputRecord = field(default_factory=OutputRecord, compare=False)
    """Where whoever generates it notes where its time goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTimeline:
    """What other ingresses said of a request."""

    text: bytes | None = None
    """Its timeline, as JSON."""
    is_running: bool = False
    num_asked: int = 0
    silent: tuple[str, ...] = ()
    """Those that did not answer."""


class Generator(Protocol):
    """Turns prompts into token deltas."""

    def generate(self, request: GenerateInput) -> AsyncIterator[TokenDelta]:
        """Deltas of one request, in order, ending with one that has a `finish_reason`.

        Closing the iterator early cancels the request on every leg. Raises errors of `atom_cluster.errors`
        (`Overloaded`, `NotReady`, `RequestFailed`, `RequestTimeout`, `InvalidRequest`); never yields an error.
        """
        ...

    async def check_ready(self) -> None:
        """Return once a real generation went through recently or goes through now; raise `NotReady` otherwise."""
        ...

    def cluster_state(self) -> dict[str, Any]:
        """What /v1/cluster shows: replicas, roles, load, choices and their reasons; JSON-serializable."""
        ...

    async def metrics_text(self) -> str:
        """Prometheus text of the whole cluster's atom_cluster metrics."""
        ...

    async def find_timeline(self, request_id: str) -> FoundTimeline:
        """Ask the other ingresses for the timeline of a request that this one does not know."""
        ...

    async def start_profile(self, request: ProfileRequest) -> dict[str, Any]:
        """Open profiler windows; what each replica said, JSON-serializable. Raises `ProfileRefused` when all refuse."""
        ...

    async def stop_profile(self, target: ProfileTarget) -> dict[str, Any]:
        """Close them; what each replica said, with its trace files, once they are written. Raises as above."""
        ...
