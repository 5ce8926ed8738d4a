"""Ingresses that stand still are ended, so that their clients learn that nobody answers them.

Serve replaces a replica that fails its health checks, and then lets the old one finish for as long as a stopping
ingress may take. One that stands still (a stopped process, a stuck machine) finishes nothing, and holds the connections
of its clients all that time. The router hears from every ingress, so it knows both: who is silent, and whether others
are there in its place. Without successors nobody is ended: an ingress that only the router does not hear may serve its
clients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from atom_cluster.messages.cluster import MemberCard


@dataclass(slots=True)
class _Heard:
    actor: str
    heard_s: float


class Fence:
    """Call from one thread. `now_s` is time as this process has lived it (`link.lived_time`): one that stood still
    itself knows of no silence."""

    def __init__(self, *, num_ingresses: int, silence_s: float, end: Callable[[str], None]) -> None:
        """`end` is called with the actor's name of an ingress that was silent for `silence_s`, once `num_ingresses`
        others were heard within that time."""
        self._num_ingresses = num_ingresses
        self._silence_s = silence_s
        self._end = end
        self._heard_by_peer: dict[str, _Heard] = {}

    def heard(self, card: MemberCard, now_s: float) -> None:
        """A member has announced itself; those that no actor name came with are left alone."""
        if card.kind == "ingress" and card.actor:
            self._heard_by_peer[card.address.peer_id] = _Heard(card.actor, now_s)

    def look(self, now_s: float) -> None:
        """End who is to be ended. To be called several times per `silence_s`."""
        silent = {
            peer_id: heard for peer_id, heard in self._heard_by_peer.items() if now_s - heard.heard_s >= self._silence_s
        }
        if not silent or len(self._heard_by_peer) - len(silent) < self._num_ingresses:
            return
        for peer_id, heard in silent.items():
            del self._heard_by_peer[peer_id]
            self._end(heard.actor)
