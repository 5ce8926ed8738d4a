"""Stop 5 of 14: one decision for the pair (prefill or none, decode), and why. Next: atom_cluster/engine/core.py.

A decision looks at groups of equal fingerprint, since only their blocks mean the same. In each group the cheapest
decode replica and the cheapest prefill replica make a pair; where decode has nearly all of the prompt, or is expected
to have it sooner than prefill (`prompt_place`), or no prefill replica belongs to the group, decode computes the rest
itself. The cheapest group wins. While no replica decodes, those of prefill serve whole requests. A decode engine that
finds more of the prompt in its cache than was known here may still not use the prefill replica. Knows nothing of time,
messages or sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from atom_cluster.config.routing import RoutingConfig
from atom_cluster.messages.cluster import RouteQuery
from atom_cluster.routing.candidates import Candidate, CostModel, count_hits
from atom_cluster.routing.prompt_place import compare

REASONS = (
    "prefix",
    "load",
    "hot_prefix_spread",
    "round_robin",
    "no_prefill",
    "no_decode",
    "fingerprint_mismatch",
    "no_engine",
    "none_eligible",
    "router_away",
)
"""Why a decision is what it is.

prefix: a chosen replica has part of the prompt cached.
load: least loaded; no cached prefix was worth more.
hot_prefix_spread: a replica with more of the prompt cached was passed over because it has too much to do.
round_robin: its turn.
no_prefill: a decode replica alone, as no prefill replica is there.
no_decode: a prefill replica alone, as no decode replica can take the request.
fingerprint_mismatch: a decode replica alone, as no prefill replica's blocks mean the same as its own.
no_engine: nobody; no engine that may decode is known.
none_eligible: nobody; all engines that may decode are draining or just failed this request.
router_away: chosen by the ingress itself (`routing.fallback`).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A pair, or one replica for both."""

    decode: Candidate
    prefill: Candidate | None
    """None if decode is to compute the prompt, whatever it finds in its cache."""
    place: str
    """Of `prompt_place.PLACES`."""
    cost: float
    reason: str

    @property
    def is_local(self) -> bool:
        """The prompt is expected to be computed where it is decoded, with or without a prefill replica at hand."""
        return self.place != "remote"


class RoutingPolicy:
    """Chooses among candidates. Its only state is whose turn it is in round robin."""

    def __init__(self, config: RoutingConfig, *, min_remote_tokens: int, conditional_prefill: bool) -> None:
        """Both of the keywords are as in `kv_transfer`."""
        self._config = config
        self._min_remote_tokens = min_remote_tokens
        self._conditional_prefill = conditional_prefill
        self._num_turns = 0

    def choose(self, query: RouteQuery, candidates: Sequence[Candidate]) -> Choice | None:
        """The best choice, or None if no candidate may decode.

        Candidates are alive, neither draining nor excluded, in a stable order; their `counted_blocks` are 0.
        """
        decoders = [candidate for candidate in candidates if candidate.card.role != "prefill"]
        prefills = [candidate for candidate in candidates if candidate.card.role == "prefill"]
        if not decoders and self._config.prefill_may_decode:
            decoders, prefills = prefills, []
        if not decoders:
            return None
        costs = CostModel(query, self._config.output_token_weight)
        if self._config.policy == "round_robin":
            choice = self._next_in_turn(costs, prefills, decoders)
        else:
            choice = self._cheapest(costs, prefills, decoders)
        if choice.place == "prefill_away":
            return replace(choice, reason="fingerprint_mismatch" if prefills else "no_prefill")
        if choice.place == "decode_away":
            return replace(choice, reason="no_decode")
        return choice

    def _next_in_turn(self, costs: CostModel, prefills: list[Candidate], decoders: list[Candidate]) -> Choice:
        decode = decoders[self._num_turns % len(decoders)]
        prefills = _partners(decode, prefills)
        prefill = prefills[self._num_turns % len(prefills)] if prefills else None
        self._num_turns += 1
        hit = replace(decode, counted_blocks=decode.cached_blocks)
        place = self._place(costs, prefill, hit)
        return Choice(decode=decode, prefill=_named(prefill, place), place=place, cost=0.0, reason="round_robin")

    def _cheapest(self, costs: CostModel, prefills: list[Candidate], decoders: list[Candidate]) -> Choice:
        """The cheapest of the best pair for each decode replica."""
        prefills = self._weighed(costs, prefills)
        decoders = self._weighed(costs, decoders)
        best_prefill_by_fingerprint: dict[str, Candidate] = {}
        for prefill in sorted(prefills, key=lambda prefill: (costs.prefill(prefill), prefill.placed_order)):
            best_prefill_by_fingerprint.setdefault(prefill.card.fingerprint, prefill)
        choices = [self._pair(costs, best_prefill_by_fingerprint.get(d.card.fingerprint), d) for d in decoders]
        best = min(choices, key=lambda choice: (choice.cost, choice.decode.placed_order))
        if self._config.policy == "least_loaded":
            return best
        return replace(best, reason=_reason(best, prefills, decoders))

    def _weighed(self, costs: CostModel, candidates: list[Candidate]) -> list[Candidate]:
        if self._config.policy == "least_loaded":
            return candidates
        return count_hits(candidates, costs, load_factor=self._config.load_factor)

    def _pair(self, costs: CostModel, prefill: Candidate | None, decode: Candidate) -> Choice:
        """One decode replica with its best partner; one that serves whole requests has none and needs none."""
        place = self._place(costs, prefill, decode)
        cost = costs.decode(decode)
        if prefill is not None and place == "remote":
            cost += costs.transfer(decode) + costs.prefill(prefill)
        else:
            cost += costs.uncached_tokens(decode)
        return Choice(decode=decode, prefill=_named(prefill, place), place=place, cost=cost, reason="load")

    def _place(self, costs: CostModel, prefill: Candidate | None, decode: Candidate) -> str:
        """Where the prompt is computed, of `prompt_place.PLACES`."""
        if decode.card.role != "decode":
            return "unified" if decode.card.role == "unified" else "decode_away"
        if prefill is None:
            return "prefill_away"
        if costs.uncached_tokens(decode) < self._min_remote_tokens:
            return "short"
        if not self._conditional_prefill:
            return "remote"
        return compare(costs.side(decode), costs.side(prefill)).place


def _named(prefill: Candidate | None, place: str) -> Candidate | None:
    """The prefill replica that decode is told of. If all that speaks against it is decode's cache, decode may see that
    differently."""
    return prefill if place in ("remote", "short") else None


def _partners(decode: Candidate, prefills: Sequence[Candidate]) -> list[Candidate]:
    if decode.card.role != "decode":
        return []
    return [prefill for prefill in prefills if prefill.card.fingerprint == decode.card.fingerprint]


def _reason(choice: Choice, prefills: Sequence[Candidate], decoders: Sequence[Candidate]) -> str:
    """Whether the caches decided, or would have if their owners were less busy."""
    has_hit = choice.decode.counted_blocks > 0
    has_hit |= choice.prefill is not None and not choice.is_local and choice.prefill.counted_blocks > 0
    if has_hit:
        return "prefix"
    is_spread = any(candidate.counted_blocks < candidate.cached_blocks for candidate in (*prefills, *decoders))
    return "hot_prefix_spread" if is_spread else "load"
