"""A replica as a candidate for one request: what is cached there, how busy it is, and what sending the request costs.

All costs are in tokens of prefill work, the time it takes to compute one prompt token, so that a cache hit, a queue and
a KV transfer can be added up. A cost is the expected delay of this request, plus a share of recent work that evens out
replicas when nothing is queued anywhere. Knows nothing of how replicas are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from atom_cluster.messages.cluster import MemberCard, RouteQuery
from atom_cluster.routing.load_view import LoadEstimate
from atom_cluster.routing.prompt_place import Side
from atom_cluster.units import ceil_div

TRANSFER_TOKEN_COST = 0.05
"""Moving one token's KV between replicas. A link moves KV some twenty times faster than a device computes it."""
RECENT_TOKEN_COST = 0.1
"""One token of recent work. Below 1, so that a worthwhile cache hit beats a replica that was merely idle for longer;
above 0, because with requests one at a time a prefix that everybody shares would draw them all to one replica."""
MAX_COUNTED_OUTPUT_TOKENS = 256
"""Expected output beyond this is not believed: clients often send the most the model can do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One replica, seen from one request."""

    card: MemberCard
    load: LoadEstimate
    cached_blocks: int = 0
    """Leading blocks of the prompt that it is expected to have."""
    counted_blocks: int = 0
    """As many of them as count in its favour."""
    placed_order: int = 0
    """When it was last chosen, as a running number: breaks ties, least recent first."""


def believed_output_tokens(query: RouteQuery) -> int:
    """Output tokens that a request is believed to produce, from what it says to expect."""
    return min(query.expected_output_tokens, MAX_COUNTED_OUTPUT_TOKENS)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Prices of one request on any candidate."""

    query: RouteQuery
    output_token_weight: float

    def uncached_tokens(self, candidate: Candidate) -> int:
        """Prompt tokens to compute there; at least one, the last, which every prompt needs for its first output."""
        return max(1, self.query.num_tokens - candidate.counted_blocks * candidate.card.block_size)

    @property
    def per_request(self) -> float:
        """What one running request adds to the duration of another that runs beside it."""
        return self.output_token_weight * max(1, believed_output_tokens(self.query))

    def missing_tokens(self, candidate: Candidate, num_tokens: int) -> int:
        """Tokens by which a replica's free blocks fall short of a request that keeps `num_tokens` there."""
        if candidate.load.num_free_blocks is None:
            return 0
        block_size = candidate.card.block_size
        needed_blocks = ceil_div(num_tokens, block_size) - candidate.counted_blocks
        return max(0, needed_blocks - candidate.load.num_free_blocks) * block_size

    def prefill(self, candidate: Candidate) -> float:
        """Computing the prompt there and handing it over."""
        return (
            self.uncached_tokens(candidate)
            + candidate.load.num_waiting_tokens
            + self.missing_tokens(candidate, self.query.num_tokens)
            + RECENT_TOKEN_COST * candidate.load.recent_tokens
        )

    def decode(self, candidate: Candidate) -> float:
        """Producing the output there, with the prompt's KV at hand. Full replicas make the request wait for others."""
        missing_tokens = self.missing_tokens(candidate, self.query.num_tokens + believed_output_tokens(self.query))
        return (
            self.per_request * candidate.load.num_requests
            + candidate.load.num_waiting_tokens
            + self.output_token_weight * missing_tokens
            + RECENT_TOKEN_COST * candidate.load.recent_tokens
        )

    def transfer(self, candidate: Candidate) -> float:
        """Bringing over the KV that it lacks."""
        return TRANSFER_TOKEN_COST * self.uncached_tokens(candidate)

    def side(self, candidate: Candidate) -> Side:
        """The candidate as one of two that might compute the prompt. What is cached there is found, busy or not."""
        num_cached_tokens = candidate.cached_blocks * candidate.card.block_size
        return Side(
            speed=candidate.load.speed,
            num_waiting_tokens=candidate.load.num_waiting_tokens,
            num_missing_tokens=max(1, self.query.num_tokens - num_cached_tokens),
            num_decoding=candidate.load.num_requests,
        )

    def queued(self, candidate: Candidate) -> float:
        """What the candidate has to do at the moment."""
        per_request = 0.0 if candidate.card.role == "prefill" else self.per_request
        return per_request * candidate.load.num_requests + candidate.load.num_waiting_tokens

    def own_load(self, candidate: Candidate) -> float:
        """What this request would add to `queued` if nothing of it were cached."""
        per_request = 0.0 if candidate.card.role == "prefill" else self.per_request
        return per_request + (0 if candidate.card.role == "decode" else self.query.num_tokens)


def count_hits(candidates: Sequence[Candidate], costs: CostModel, *, load_factor: float) -> list[Candidate]:
    """The same candidates of one kind, with their cached blocks counted unless their load is out of bounds.

    The bound is `load_factor` times the mean load plus the request itself. It keeps a prefix that everybody shares from
    drawing everybody to the replicas that have it: those above it compete by load alone, so another one computes the
    prefix and has it from then on.
    """
    if not candidates:
        return []
    queued = [costs.queued(candidate) for candidate in candidates]
    bound = load_factor * sum(queued) / len(queued)
    return [
        replace(candidate, counted_blocks=candidate.cached_blocks)
        if load <= bound + costs.own_load(candidate)
        else candidate
        for candidate, load in zip(candidates, queued)
    ]
