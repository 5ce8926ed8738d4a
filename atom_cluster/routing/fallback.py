"""FallbackPlacer: how an ingress places requests by itself while the router is away.

By load alone, and the only load it knows is its own: how many requests it has open on each replica. Of two replicas
picked at random the less busy one is taken, so that several ingresses, blind to each other, do not all choose the same.
Knows nothing of caches, of time or of sockets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from random import Random

from atom_cluster.messages.cluster import MemberCard, RouteDecision, RouteQuery


class FallbackPlacer:
    """Counts this ingress's open requests, whoever placed them, and chooses by that count. Not thread-safe."""

    def __init__(self, random: Random, *, prefill_may_decode: bool = True) -> None:
        """`prefill_may_decode` as in `router`."""
        self._random = random
        self._prefill_may_decode = prefill_may_decode
        self._num_open_by_peer: Counter[str] = Counter()

    def num_open(self, peer_id: str) -> int:
        """Requests that this ingress has open on a replica, as either half of a pair."""
        return self._num_open_by_peer[peer_id]

    def started(self, decision: RouteDecision) -> None:
        """A request goes where this decision, of the router or of `decide`, says."""
        self._num_open_by_peer.update(_peers(decision))

    def finished(self, decision: RouteDecision) -> None:
        """A request that was started with this decision has ended."""
        for peer_id in _peers(decision):
            self._num_open_by_peer[peer_id] -= 1
            if self._num_open_by_peer[peer_id] <= 0:
                del self._num_open_by_peer[peer_id]

    def decide(self, query: RouteQuery, members: Iterable[MemberCard]) -> RouteDecision:
        """A decode replica and, unless that one is unified, a prefill replica with the same fingerprint if any.

        `members` are the last known ones; draining and excluded replicas are not chosen. Without any decode replica it
        is a prefill replica alone, if that may be; else the decision is nobody, with the same reasons as the router's.
        """
        engines = [card for card in members if card.kind == "engine"]
        eligible = [card for card in engines if not card.is_draining and card.address.peer_id not in query.excluded]
        decoders = [card for card in eligible if card.role != "prefill"]
        if not decoders and self._prefill_may_decode:
            decoders = eligible
        if not decoders:
            has_decoder = any(self._prefill_may_decode or card.role != "prefill" for card in engines)
            reason = "none_eligible" if has_decoder else "no_engine"
            return RouteDecision(query_id=query.query_id, decode=None, reason=reason)
        decode = self._less_busy(decoders)
        partners = [card for card in eligible if card.role == "prefill" and card.fingerprint == decode.fingerprint]
        prefill = self._less_busy(partners) if partners and decode.role == "decode" else None
        return RouteDecision(
            query_id=query.query_id,
            decode=decode.address,
            prefill=None if prefill is None else prefill.address,
            reason="router_away",
        )

    def _less_busy(self, cards: Sequence[MemberCard]) -> MemberCard:
        pair = self._random.sample(cards, min(2, len(cards)))
        return min(pair, key=lambda card: self._num_open_by_peer[card.address.peer_id])


def _peers(decision: RouteDecision) -> tuple[str, ...]:
    return tuple(address.peer_id for address in (decision.decode, decision.prefill) if address is not None)
