"""RouterState: everything the router knows, and its answers. Members, their loads, their caches, one policy.

Pure: the caller brings messages, the time and the name of whoever asks, and carries the answers away. Losing it loses
no request; a new one asks every engine for a snapshot. An announcement decides which incarnation (epoch) of a member
counts: load and cache events of another one are ignored, so engines put the epoch of their card's address into them.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from atom_cluster.config.routing import RoutingConfig
from atom_cluster.messages.cluster import (
    CacheEvents,
    CacheSnapshot,
    MemberCard,
    Membership,
    PeerAddress,
    ReplicaLoad,
    RequestDone,
    RouteDecision,
    RouteQuery,
    SnapshotRequest,
)
from atom_cluster.observability.logging import get_logger
from atom_cluster.observability.metrics import (
    ROUTER_DECISIONS,
    ROUTER_EXPECTED_HITS,
    ROUTER_IMBALANCE,
    ROUTER_INDEX_BLOCKS,
    ROUTER_MEMBER_CHANGES,
    ROUTER_MEMBERS,
    ROUTER_PLACES,
    ROUTER_PROMPT_TOKENS,
    ROUTER_SNAPSHOTS,
    MetricSink,
)
from atom_cluster.routing.candidates import Candidate, believed_output_tokens
from atom_cluster.routing.load_view import Leg, LoadEstimate, LoadView
from atom_cluster.routing.policy import Choice, RoutingPolicy
from atom_cluster.routing.prefix_index import PrefixIndex
from atom_cluster.units import ceil_div

SNAPSHOT_RETRY_S = 1.0
"""A snapshot that has not arrived by then is asked for again."""
_WEIGHING_PERIOD_S = 1.0
"""How often engines are compared, for a gauge that is exported as often."""

_logger = get_logger(__name__)


@dataclass(slots=True)
class _Member:
    card: MemberCard
    heard_s: float
    placed_order: int = 0
    snapshot_asked_s: float | None = None
    ignored_epoch: int | None = None
    """Last foreign epoch that was warned about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """What the router knows of one engine, for /v1/cluster."""

    card: MemberCard
    load: LoadEstimate
    num_index_blocks: int


class RouterState:
    """Call from one thread. `now_s` is one monotonic clock in seconds, never going back."""

    def __init__(
        self,
        *,
        config: RoutingConfig,
        address: PeerAddress,
        member_timeout_s: float,
        min_remote_tokens: int,
        metrics: MetricSink,
        conditional_prefill: bool = True,
    ) -> None:
        """`address` is the router's own; `min_remote_tokens` and `conditional_prefill` are those of `kv_transfer`.

        `metrics` gets decisions by reason, places of prompts, members, index size and snapshots asked for.
        """
        self._address = address
        self._member_timeout_s = member_timeout_s
        self._metrics = metrics
        self._may_prefill_decode = config.prefill_may_decode
        self._policy = RoutingPolicy(
            config, min_remote_tokens=min_remote_tokens, conditional_prefill=conditional_prefill
        )
        self._index = PrefixIndex(config.max_index_blocks)
        self._loads = LoadView(load_period_s=config.load_period_s)
        self._member_by_peer: dict[str, _Member] = {}
        self._weighed_s = -math.inf
        self._groups: set[str] = set()
        """That there were engines of: what was said of them is to be taken back when there are none."""
        self._num_decisions = 0

    # --- members ------------------------------------------------------------------------------------------------------

    def announce(self, card: MemberCard, now_s: float) -> Membership:
        """Somebody is there, maybe as a new incarnation; the answer lists everybody who is."""
        peer_id = card.address.peer_id
        known = self._member_by_peer.get(peer_id)
        if known is not None and known.card.address.epoch != card.address.epoch:
            self.withdraw(peer_id, change="lost")
            known = None
        if known is None:
            _logger.info("%s joined, %s", peer_id, card.role or card.kind)
            self._count_change(card, "joined")
            self._member_by_peer[peer_id] = _Member(card, now_s)
        else:
            known.card = card
            known.heard_s = now_s
        if card.kind == "engine":
            self._index.track(peer_id, card.address.epoch)
        membership = self.membership(now_s)
        self._set_gauges(membership, now_s)
        return membership

    def membership(self, now_s: float) -> Membership:
        """Everybody heard from recently, in order of peer id."""
        self.expire(now_s)
        members = tuple(self._member_by_peer[peer_id].card for peer_id in sorted(self._member_by_peer))
        return Membership(router=self._address, members=members)

    def expire(self, now_s: float) -> tuple[str, ...]:
        """Leave out members that were silent too long; returns their peer ids."""
        gone = tuple(
            peer_id
            for peer_id, member in self._member_by_peer.items()
            if now_s - member.heard_s > self._member_timeout_s
        )
        for peer_id in gone:
            _logger.warning("%s was not heard from for %.1f s and is left out", peer_id, self._member_timeout_s)
            self.withdraw(peer_id, change="silent")
        return gone

    def withdraw(self, peer_id: str, *, change: str = "left") -> None:
        """A member left, was lost or is silent, as `change` says; forget all about it. Unknown ones are ignored."""
        member = self._member_by_peer.pop(peer_id, None)
        if member is not None:
            self._count_change(member.card, change)
        self._index.forget(peer_id)
        self._loads.forget(peer_id)
        self._loads.drop_source(peer_id)

    def _count_change(self, card: MemberCard, change: str) -> None:
        self._metrics.inc(ROUTER_MEMBER_CHANGES, kind=card.role or card.kind, change=change)

    def _set_gauges(self, membership: Membership, now_s: float) -> None:
        num_by_kind = Counter(card.role or card.kind for card in membership.members)
        for kind in ("ingress", "prefill", "decode", "unified"):
            self._metrics.set(ROUTER_MEMBERS, num_by_kind[kind], kind=kind)
        self._metrics.set(ROUTER_INDEX_BLOCKS, self._index.num_entries)
        if now_s - self._weighed_s >= _WEIGHING_PERIOD_S:
            self._weighed_s = now_s
            self._set_imbalance(membership, now_s)

    def _set_imbalance(self, membership: Membership, now_s: float) -> None:
        """Looks at every engine's load, which is too much for every announcement of each of them."""
        for card in membership.members:
            if card.role is not None:
                self._groups.add(card.role)
        for group in self._groups:
            peer_ids = (card.address.peer_id for card in membership.members if card.role == group)
            tokens = [self._loads.estimate(peer_id, now_s).recent_tokens for peer_id in peer_ids]
            is_idle = sum(tokens) < max(1, len(tokens))
            self._metrics.set(
                ROUTER_IMBALANCE, 1.0 if is_idle else max(tokens) * len(tokens) / sum(tokens), group=group
            )

    # --- what engines report ------------------------------------------------------------------------------------------

    def apply(self, message: CacheEvents | CacheSnapshot | ReplicaLoad, now_s: float) -> SnapshotRequest | None:
        """Take in a report. Returns what to send back to its engine, if something of it was lost."""
        member = self._member_by_peer.get(message.peer_id)
        if member is None or member.card.address.epoch != message.epoch:
            self._note_ignored(member, message)
            return None
        if isinstance(message, ReplicaLoad):
            self._loads.report(message, now_s)
            return None
        if isinstance(message, CacheSnapshot):
            self._index.apply_snapshot(message)
        else:
            self._index.apply_events(message)
        return self._snapshot_request(member, now_s)

    def wanted_snapshots(self, now_s: float) -> list[tuple[PeerAddress, SnapshotRequest]]:
        """Snapshots to ask for now: of engines that are new to this router, and of those that did not answer.

        To be called after each announcement; an engine is asked at most once per `SNAPSHOT_RETRY_S`, here and in
        `apply` together.
        """
        wanted = []
        for member in self._member_by_peer.values():
            request = self._snapshot_request(member, now_s)
            if request is not None:
                wanted.append((member.card.address, request))
        return wanted

    def _snapshot_request(self, member: _Member, now_s: float) -> SnapshotRequest | None:
        """A request for a snapshot if one is needed and none is under way."""
        if not self._index.needs_snapshot(member.card.address.peer_id):
            member.snapshot_asked_s = None
            return None
        if member.snapshot_asked_s is not None and now_s - member.snapshot_asked_s < SNAPSHOT_RETRY_S:
            return None
        member.snapshot_asked_s = now_s
        self._metrics.inc(ROUTER_SNAPSHOTS)
        return SnapshotRequest(epoch=member.card.address.epoch)

    def _note_ignored(self, member: _Member | None, message: CacheEvents | CacheSnapshot | ReplicaLoad) -> None:
        if member is not None and member.ignored_epoch != message.epoch:
            member.ignored_epoch = message.epoch
            _logger.warning(
                "ignoring reports of %s under epoch %d, it announced epoch %d",
                message.peer_id,
                message.epoch,
                member.card.address.epoch,
            )

    # --- decisions ----------------------------------------------------------------------------------------------------

    def decide(self, query: RouteQuery, *, source: str, now_s: float) -> RouteDecision:
        """Where a request goes. `source` is the peer id of the ingress that asks; its query ids are its own."""
        self.expire(now_s)
        candidates = self._candidates(query, now_s)
        choice = self._policy.choose(query, candidates)
        if choice is None:
            reason = "none_eligible" if self._has_decoder() else "no_engine"
            self._metrics.inc(ROUTER_DECISIONS, reason=reason)
            return RouteDecision(query_id=query.query_id, decode=None, reason=reason)
        self._note_placed(choice)
        self._loads.place((source, query.query_id), _legs(query, choice), now_s)
        self._metrics.inc(ROUTER_DECISIONS, reason=choice.reason)
        self._metrics.inc(ROUTER_PLACES, place=choice.place)
        self._metrics.inc(ROUTER_PROMPT_TOKENS, query.num_tokens)
        self._metrics.inc(ROUTER_EXPECTED_HITS, _expected_hits(query, choice))
        return RouteDecision(
            query_id=query.query_id,
            decode=choice.decode.card.address,
            prefill=None if choice.prefill is None else choice.prefill.card.address,
            reason=choice.reason,
            decode_cached_blocks=choice.decode.cached_blocks,
            prefill_cached_blocks=0 if choice.prefill is None else choice.prefill.cached_blocks,
        )

    def done(self, message: RequestDone, *, source: str) -> None:
        """A request that `source` placed has ended."""
        self._loads.done((source, message.query_id))

    def _candidates(self, query: RouteQuery, now_s: float) -> list[Candidate]:
        matched: dict[str, int] = {}
        for hashes in query.block_hashes:
            matched |= self._index.matched_blocks(hashes)
        return [
            Candidate(
                card=member.card,
                load=self._loads.estimate(peer_id, now_s),
                cached_blocks=matched.get(peer_id, 0),
                placed_order=member.placed_order,
            )
            for peer_id, member in sorted(self._member_by_peer.items())
            if member.card.kind == "engine" and not member.card.is_draining and peer_id not in query.excluded
        ]

    def _has_decoder(self) -> bool:
        cards = (member.card for member in self._member_by_peer.values())
        return any(card.kind == "engine" and (self._may_prefill_decode or card.role != "prefill") for card in cards)

    def _note_placed(self, choice: Choice) -> None:
        self._num_decisions += 1
        for candidate in (choice.decode, choice.prefill):
            if candidate is not None:
                self._member_by_peer[candidate.card.address.peer_id].placed_order = self._num_decisions

    # --- what is shown ------------------------------------------------------------------------------------------------

    @property
    def num_index_blocks(self) -> int:
        """Entries (replica, block) in the prefix index."""
        return self._index.num_entries

    def engine_views(self, now_s: float) -> tuple[EngineView, ...]:
        """Every engine heard from recently, in order of peer id."""
        return tuple(
            EngineView(
                card=card,
                load=self._loads.estimate(card.address.peer_id, now_s),
                num_index_blocks=self._index.num_blocks(card.address.peer_id),
            )
            for card in self.membership(now_s).members
            if card.kind == "engine"
        )


def _expected_hits(query: RouteQuery, choice: Choice) -> int:
    """Tokens of the prompt that need not be computed by either side, as far as is known here."""
    candidates = [choice.decode] if choice.is_local or choice.prefill is None else [choice.decode, choice.prefill]
    tokens = max(candidate.cached_blocks * candidate.card.block_size for candidate in candidates)
    return min(query.num_tokens, tokens)


def _legs(query: RouteQuery, choice: Choice) -> list[Leg]:
    """What the request is expected to bring to the replicas chosen."""
    decode = _leg(query, choice.decode, num_requests=1, computes_prompt=choice.is_local)
    if choice.prefill is None or choice.is_local:
        return [decode]
    return [decode, _leg(query, choice.prefill, num_requests=0, computes_prompt=True)]


def _leg(query: RouteQuery, candidate: Candidate, *, num_requests: int, computes_prompt: bool) -> Leg:
    block_size = candidate.card.block_size
    num_uncached_tokens = max(1, query.num_tokens - candidate.cached_blocks * block_size)
    num_tokens = num_uncached_tokens if computes_prompt else 0
    return Leg(
        peer_id=candidate.card.address.peer_id,
        num_requests=num_requests,
        num_tokens=num_tokens,
        num_blocks=max(1, ceil_div(query.num_tokens, block_size) - candidate.cached_blocks),
        work_tokens=num_tokens + num_requests * believed_output_tokens(query),
    )
