"""LoadView: how busy each replica is, as it last said, plus what was sent its way since.

Reports come every 100 ms or so. Without the placements made since, a burst between two reports would go to one replica.
A placement counts until a report must have included it, one that came at least `SETTLE_S` after it (the request needs
that long to reach the engine), or until its request ends. Besides the present, the view keeps a decaying sum of the
work placed on each replica, so that requests that come one at a time do not all go to the same idle one. Knows nothing
of caches or of how to choose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from atom_cluster.messages.cluster import EngineSpeed, ReplicaLoad

SETTLE_S = 0.05
"""A report received this soon after a placement may have been made before the request arrived at the engine."""
RECENT_S = 60.0
"""Time constant of the decaying sum of placed work."""

PlacementKey = tuple[str, int]
"""Who asked (peer id of the ingress) and its query id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """What one request is expected to bring to one replica."""

    peer_id: str
    num_requests: int
    """1 where it decodes, 0 where it is only prefilled."""
    num_tokens: int
    """Prompt tokens to compute there."""
    num_blocks: int
    """KV blocks to allocate there."""
    work_tokens: int
    """All tokens to compute there, outputs included: what the sum of recent work counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEstimate:
    """A replica's load now, reported and placed together."""

    num_requests: int = 0
    """Running or waiting."""
    num_waiting_tokens: int = 0
    """Prompt tokens to compute before a new prompt's turn comes."""
    num_free_blocks: int | None = None
    """Never below zero; None before the first report."""
    recent_tokens: float = 0.0
    """Tokens of work placed here lately, by this router, decaying with `RECENT_S`."""
    speed: EngineSpeed = EngineSpeed()
    """As reported; empty before the first report."""
    age_s: float | None = None
    """Since the last report; None before the first."""


@dataclass(slots=True)
class _Replica:
    report: ReplicaLoad | None = None
    reported_s: float = -math.inf
    leg_by_key: dict[PlacementKey, tuple[Leg, float]] = field(default_factory=dict)
    """Legs placed and not known to be included in `report`, with when."""
    recent_tokens: float = 0.0
    recent_at_s: float = 0.0


class LoadView:
    """Load by replica. Times are seconds of one monotonic clock, given by the caller, never going back."""

    def __init__(self, *, load_period_s: float) -> None:
        self._forget_s = 2 * load_period_s + SETTLE_S
        self._replica_by_peer: dict[str, _Replica] = {}
        self._peers_by_key: dict[PlacementKey, tuple[str, ...]] = {}

    @property
    def num_placements(self) -> int:
        """Placements still counted on top of reports."""
        return len(self._peers_by_key)

    def report(self, load: ReplicaLoad, now_s: float) -> None:
        """Take in a replica's own account of its load; placements it must have included are counted no more."""
        replica = self._replica_by_peer.setdefault(load.peer_id, _Replica())
        replica.report = load
        replica.reported_s = now_s
        self._settle(load.peer_id, replica, now_s)

    def place(self, key: PlacementKey, legs: Iterable[Leg], now_s: float) -> None:
        """A request was sent towards these replicas."""
        self.done(key)
        peers = []
        for leg in legs:
            replica = self._replica_by_peer.setdefault(leg.peer_id, _Replica())
            replica.leg_by_key[key] = (leg, now_s)
            replica.recent_tokens = _decayed(replica, now_s) + leg.work_tokens
            replica.recent_at_s = now_s
            peers.append(leg.peer_id)
        self._peers_by_key[key] = tuple(peers)

    def done(self, key: PlacementKey) -> None:
        """The request ended; what it was expected to bring is counted no more. Unknown keys are ignored."""
        for peer_id in self._peers_by_key.pop(key, ()):
            replica = self._replica_by_peer.get(peer_id)
            if replica is not None:
                replica.leg_by_key.pop(key, None)

    def drop_source(self, source: str) -> None:
        """An ingress is gone and will not say what ended."""
        for key in [key for key in self._peers_by_key if key[0] == source]:
            self.done(key)

    def forget(self, peer_id: str) -> None:
        """A replica is gone or started anew."""
        replica = self._replica_by_peer.pop(peer_id, None)
        if replica is not None:
            for key in replica.leg_by_key:
                self._leave(key, peer_id)

    def estimate(self, peer_id: str, now_s: float) -> LoadEstimate:
        """Load of a replica now; all zero for an unknown one."""
        replica = self._replica_by_peer.get(peer_id)
        if replica is None:
            return LoadEstimate()
        self._settle(peer_id, replica, now_s)
        legs = [leg for leg, _ in replica.leg_by_key.values()]
        num_requests = sum(leg.num_requests for leg in legs)
        num_waiting_tokens = sum(leg.num_tokens for leg in legs)
        recent_tokens = _decayed(replica, now_s)
        report = replica.report
        if report is None:
            return LoadEstimate(
                num_requests=num_requests, num_waiting_tokens=num_waiting_tokens, recent_tokens=recent_tokens
            )
        return LoadEstimate(
            num_requests=num_requests + report.num_running + report.num_waiting,
            num_waiting_tokens=num_waiting_tokens + report.num_waiting_tokens,
            num_free_blocks=max(0, report.num_free_blocks - sum(leg.num_blocks for leg in legs)),
            recent_tokens=recent_tokens,
            speed=report.speed,
            age_s=now_s - replica.reported_s,
        )

    def _settle(self, peer_id: str, replica: _Replica, now_s: float) -> None:
        """Drop legs that the last report includes.

        A report that came just after a placement may or may not include it. If no other one follows within the
        reporting period, then nothing changed since, so it did. A replica that reports nothing at all keeps them.
        """
        settled = [
            key
            for key, (_, placed_s) in replica.leg_by_key.items()
            if replica.reported_s >= placed_s + SETTLE_S
            or (replica.reported_s >= placed_s and now_s >= placed_s + self._forget_s)
        ]
        for key in settled:
            del replica.leg_by_key[key]
            self._leave(key, peer_id)

    def _leave(self, key: PlacementKey, peer_id: str) -> None:
        remaining = tuple(peer for peer in self._peers_by_key.get(key, ()) if peer != peer_id)
        if remaining:
            self._peers_by_key[key] = remaining
        else:
            self._peers_by_key.pop(key, None)


def _decayed(replica: _Replica, now_s: float) -> float:
    return replica.recent_tokens * math.exp(-(now_s - replica.recent_at_s) / RECENT_S)
