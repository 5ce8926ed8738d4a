"""Placement without the router: valid pairs, evenly spread by the caller's own count."""

from __future__ import annotations

from random import Random

import pytest

from atom_cluster.routing.fallback import FallbackPlacer
from atom_cluster.routing.policy import REASONS
from tests.routing.builders import make_card, make_query


@pytest.fixture
def placer() -> FallbackPlacer:
    return FallbackPlacer(Random(3))


def test_a_decode_replica_is_paired_with_a_prefill_replica_of_equal_fingerprint(placer: FallbackPlacer) -> None:
    members = [
        make_card("p-other", "prefill", fingerprint="other"),
        make_card("p", "prefill"),
        make_card("d", "decode"),
    ]
    decision = placer.decide(make_query(range(4), query_id=7), members)
    assert decision.prefill is not None
    assert decision.decode is not None
    assert (decision.query_id, decision.prefill.peer_id, decision.decode.peer_id) == (7, "p", "d")
    assert decision.reason == "router_away"
    assert decision.reason in REASONS


def test_without_a_partner_or_for_a_unified_replica_there_is_no_prefill(placer: FallbackPlacer) -> None:
    stranger = make_card("p", "prefill", fingerprint="x")
    assert placer.decide(make_query(), [make_card("d", "decode"), stranger]).prefill is None
    assert placer.decide(make_query(), [make_card("u"), make_card("p", "prefill")]).prefill is None


def test_draining_and_excluded_replicas_are_not_chosen(placer: FallbackPlacer) -> None:
    members = [make_card("a", is_draining=True), make_card("b"), make_card("c")]
    for _ in range(20):
        decision = placer.decide(make_query(excluded=("b",)), members)
        assert decision.decode is not None
        assert decision.decode.peer_id == "c"
    assert placer.decide(make_query(excluded=("b", "c")), members).reason == "none_eligible"
    assert placer.decide(make_query(), []).reason == "no_engine"


def test_a_prefill_replica_serves_whole_requests_while_no_decode_replica_can(placer: FallbackPlacer) -> None:
    members = [make_card("p", "prefill"), make_card("d", "decode", is_draining=True)]
    decision = placer.decide(make_query(), members)
    assert decision.decode == members[0].address and decision.prefill is None
    placer = FallbackPlacer(Random(3), prefill_may_decode=False)
    assert placer.decide(make_query(), members).reason == "none_eligible"
    assert placer.decide(make_query(), members[:1]).reason == "no_engine"


def test_open_requests_stay_even_on_both_sides(placer: FallbackPlacer) -> None:
    members = [make_card(f"d{i}", "decode") for i in range(8)] + [make_card(f"p{i}", "prefill") for i in range(4)]
    decisions = []
    for _ in range(800):
        decisions.append(placer.decide(make_query(), members))
        placer.started(decisions[-1])
    assert all(95 <= placer.num_open(f"d{i}") <= 105 for i in range(8))
    assert all(195 <= placer.num_open(f"p{i}") <= 205 for i in range(4))
    for decision in decisions:
        placer.finished(decision)
    assert all(placer.num_open(card.address.peer_id) == 0 for card in members)


def test_a_replica_left_alone_gets_the_next_requests(placer: FallbackPlacer) -> None:
    members = [make_card("a"), make_card("b")]
    for _ in range(5):
        placer.started(placer.decide(make_query(), members[:1]))
    chosen = {placer.decide(make_query(), members).decode for _ in range(10)}
    assert chosen == {members[1].address}
