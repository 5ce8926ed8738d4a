"""RouterState: members come and go, epochs, lost events, decisions with their accounting, a restart."""

from __future__ import annotations

import msgspec
import pytest

from atom_cluster.config.routing import RoutingConfig
from atom_cluster.messages.cluster import (
    CacheEvents,
    EngineSpeed,
    MemberCard,
    PeerAddress,
    RequestDone,
    RouteDecision,
)
from atom_cluster.observability.memory import MemoryMetrics
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
)
from atom_cluster.routing.load_view import LoadEstimate
from atom_cluster.routing.state import SNAPSHOT_RETRY_S, RouterState
from tests.routing.builders import CacheModel, make_card, make_load, make_query

_TIMEOUT_S = 3.0


@pytest.fixture
def metrics() -> MemoryMetrics:
    return MemoryMetrics()


@pytest.fixture
def state(metrics: MemoryMetrics) -> RouterState:
    return _make_state(metrics)


def _make_state(metrics: MemoryMetrics) -> RouterState:
    return RouterState(
        config=RoutingConfig(),
        address=PeerAddress(peer_id="router", endpoint="tcp://127.0.0.1:1", epoch=9),
        member_timeout_s=_TIMEOUT_S,
        min_remote_tokens=16,
        metrics=metrics,
    )


def _decode_id(decision: RouteDecision) -> str | None:
    return None if decision.decode is None else decision.decode.peer_id


def _ingress(peer_id: str = "ingress") -> MemberCard:
    return MemberCard(address=PeerAddress(peer_id=peer_id, endpoint="", epoch=1), kind="ingress")


def test_an_announcement_is_answered_with_everybody(state: RouterState, metrics: MemoryMetrics) -> None:
    state.announce(_ingress(), 0.0)
    state.announce(make_card("p", "prefill"), 0.0)
    membership = state.announce(make_card("d", "decode"), 0.0)
    assert [card.address.peer_id for card in membership.members] == ["d", "ingress", "p"]
    assert membership.router.peer_id == "router"
    assert metrics.value(ROUTER_MEMBERS, kind="decode") == 1
    assert metrics.value(ROUTER_MEMBERS, kind="ingress") == 1


def test_silent_members_are_left_out_and_not_chosen(state: RouterState, metrics: MemoryMetrics) -> None:
    state.announce(make_card("a"), 0.0)
    state.announce(make_card("b"), 2.0)
    decision = state.decide(make_query(), source="ingress", now_s=4.0)
    assert _decode_id(decision) == "b"
    assert [card.address.peer_id for card in state.announce(_ingress(), 4.0).members] == ["b", "ingress"]
    assert state.expire(10.0) == ("b", "ingress")
    state.announce(_ingress(), 10.0)
    assert metrics.value(ROUTER_MEMBERS, kind="unified") == 0


def test_draining_and_excluded_engines_are_not_chosen(state: RouterState) -> None:
    assert state.decide(make_query(), source="i", now_s=0.0).reason == "no_engine"
    state.announce(make_card("p", "prefill"), 0.0)
    assert state.decide(make_query(), source="i", now_s=0.0).reason == "no_decode"
    state.withdraw("p")
    state.announce(make_card("a", "decode"), 0.0)
    state.announce(make_card("b", "decode"), 0.0)
    state.announce(make_card("b", "decode", is_draining=True), 0.1)
    assert _decode_id(state.decide(make_query(), source="i", now_s=0.1)) == "a"
    nobody = state.decide(make_query(excluded=("a",)), source="i", now_s=0.1)
    assert (nobody.decode, nobody.reason) == (None, "none_eligible")
    state.announce(make_card("p", "prefill", is_draining=True), 0.1)
    assert state.decide(make_query(range(9)), source="i", now_s=0.1).prefill is None


def test_a_withdrawn_member_is_gone_at_once(state: RouterState) -> None:
    state.announce(make_card("a"), 0.0)
    state.withdraw("a")
    state.withdraw("a")
    assert state.decide(make_query(), source="i", now_s=0.0).reason == "no_engine"


def test_the_cache_decides_and_the_decision_says_so(state: RouterState, metrics: MemoryMetrics) -> None:
    hashes = tuple(range(50))
    for peer_id in ("a", "b", "c"):
        state.announce(make_card(peer_id), 0.0)
    state.apply(CacheModel("b", 100).use(hashes[:40]), 0.0)
    decision = state.decide(make_query(hashes), source="i", now_s=0.0)
    assert (_decode_id(decision), decision.reason, decision.decode_cached_blocks) == ("b", "prefix", 40)
    assert metrics.value(ROUTER_DECISIONS, reason="prefix") == 1


def test_engines_of_two_kinds_are_each_found_by_the_hashes_of_their_own_kind(state: RouterState) -> None:
    old, new = CacheModel("d-old", capacity=100), CacheModel("d-new", capacity=100)
    for cache, fingerprint in ((old, "old"), (new, "new")):
        state.announce(make_card(cache.peer_id, fingerprint=fingerprint), 0.0)
        state.apply(cache.snapshot(), 0.0)
    state.apply(old.use([1, 2, 3]), 0.0)
    state.apply(new.use([11, 12, 13, 14]), 0.0)
    query = msgspec.structs.replace(make_query([1, 2, 3, 4]), block_hashes=((1, 2, 3, 4), (11, 12, 13, 14)))
    cached = {c.card.address.peer_id: c.cached_blocks for c in state._candidates(query, 0.0)}
    assert cached == {"d-old": 3, "d-new": 4}
    assert _decode_id(state.decide(query, source="i", now_s=0.0)) == "d-new"


def test_a_burst_between_two_reports_is_spread(state: RouterState) -> None:
    engines = [f"u{i}" for i in range(4)]
    for peer_id in engines:
        state.announce(make_card(peer_id), 0.0)
        state.apply(make_load(peer_id, running=1), 0.0)
    chosen = [
        _decode_id(state.decide(make_query(query_id=i, num_tokens=500), source="i", now_s=0.01)) for i in range(40)
    ]
    assert {chosen.count(peer_id) for peer_id in engines} == {10}


def test_query_ids_of_two_ingresses_do_not_collide_and_done_frees(state: RouterState) -> None:
    state.announce(make_card("a"), 0.0)
    for source in ("one", "other"):
        state.announce(_ingress(source), 0.0)
        state.decide(make_query(query_id=1), source=source, now_s=0.0)
    assert state.engine_views(0.0)[0].load.num_requests == 2
    state.done(RequestDone(1), source="one")
    assert state.engine_views(0.0)[0].load.num_requests == 1
    state.withdraw("other")
    assert state.engine_views(0.0)[0].load.num_requests == 0


def test_prefill_work_is_counted_on_prefill_and_the_request_on_decode(state: RouterState) -> None:
    state.announce(make_card("p", "prefill"), 0.0)
    state.announce(make_card("d", "decode"), 0.0)
    state.decide(make_query(range(10), num_tokens=170), source="i", now_s=0.0)
    decode, prefill = state.engine_views(0.0)
    assert (decode.load.num_requests, decode.load.num_waiting_tokens) == (1, 0)
    assert (prefill.load.num_requests, prefill.load.num_waiting_tokens) == (0, 170)


def test_prompts_of_a_burst_go_where_those_before_them_leave_room(state: RouterState, metrics: MemoryMetrics) -> None:
    """Between two reports of the engines: placements count at once, on the side that they went to."""
    speed = EngineSpeed(prompt_s=((1000, 1.0),), chunk_tokens=8192)
    for peer_id, role in (("p", "prefill"), ("d", "decode")):
        state.announce(make_card(peer_id, role), 0.0)  # type: ignore[arg-type]
        state.apply(msgspec.structs.replace(make_load(peer_id), speed=speed), 0.0)
    decisions = [
        state.decide(make_query(query_id=number, num_tokens=170), source="i", now_s=0.0) for number in range(10)
    ]
    is_local = [decision.prefill is None for decision in decisions]
    # The more rows decode will have, the longer a queue at prefill they bear.
    assert is_local == [False, True, False, True, False, False, True, False, True, False]
    assert {decision.reason for decision in decisions} == {"load"}
    decode, prefill = state.engine_views(0.0)
    assert (decode.load.num_waiting_tokens, prefill.load.num_waiting_tokens) == (4 * 170, 6 * 170)
    assert metrics.value(ROUTER_PLACES, place="remote") == 6
    assert metrics.value(ROUTER_PLACES, place="prefill_busy") == 4


def test_a_new_engine_is_asked_for_a_snapshot_until_it_answers(state: RouterState) -> None:
    state.announce(_ingress(), 0.0)
    card = make_card("a")
    state.announce(card, 0.0)
    assert [(address, request.epoch) for address, request in state.wanted_snapshots(0.0)] == [(card.address, 1)]
    assert state.wanted_snapshots(SNAPSHOT_RETRY_S / 2) == []
    assert len(state.wanted_snapshots(SNAPSHOT_RETRY_S)) == 1
    state.apply(CacheModel("a", 100).snapshot(), 1.5)
    assert state.wanted_snapshots(9.0) == []


def test_lost_events_ask_for_one_snapshot_at_a_time(state: RouterState, metrics: MemoryMetrics) -> None:
    state.announce(make_card("a"), 0.0)
    cache = CacheModel("a", 100)
    assert state.apply(cache.use((1,)), 0.0) is None
    cache.use((2,))
    request = state.apply(cache.use((3,)), 1.0)
    assert request is not None
    assert request.epoch == 1
    assert state.apply(cache.use((4,)), 1.1) is None
    assert state.wanted_snapshots(1.2) == []
    assert state.apply(cache.use((5,)), 1.0 + SNAPSHOT_RETRY_S) is not None
    assert state.apply(cache.snapshot(), 2.5) is None
    assert state.wanted_snapshots(9.0) == []
    assert metrics.value(ROUTER_SNAPSHOTS) == 2
    state.announce(make_card("a"), 2.5)
    assert metrics.value(ROUTER_INDEX_BLOCKS) == state.num_index_blocks == 5


def test_reports_of_an_incarnation_that_did_not_announce_itself_are_ignored(state: RouterState) -> None:
    state.apply(make_load("a", running=7), 0.0)
    state.announce(make_card("a", epoch=1), 0.0)
    state.apply(make_load("a", running=7, epoch=2), 0.0)
    assert state.apply(CacheEvents(peer_id="a", epoch=2, first_seq=5, stored=(1,)), 0.0) is None
    view = state.engine_views(0.0)[0]
    assert (view.load.num_requests, view.num_index_blocks) == (0, 0)


def test_a_new_incarnation_starts_with_no_load_and_no_cache(state: RouterState) -> None:
    state.announce(make_card("a", epoch=1), 0.0)
    state.apply(make_load("a", running=7), 0.0)
    state.apply(CacheModel("a", 100).use((1, 2)), 0.0)
    state.announce(make_card("a", epoch=2), 1.0)
    view = state.engine_views(1.0)[0]
    assert (view.load.num_requests, view.num_index_blocks) == (0, 0)
    assert len(state.wanted_snapshots(1.0)) == 1
    state.apply(make_load("a", running=2, epoch=2), 1.0)
    assert state.engine_views(1.0)[0].load.num_requests == 2


def test_a_restarted_router_decides_as_before_once_it_has_the_snapshots(metrics: MemoryMetrics) -> None:
    caches = {f"u{i}": CacheModel(f"u{i}", 60) for i in range(4)}
    chains = [tuple(range(1000 * chain, 1000 * chain + 30)) for chain in range(12)]
    loads = {peer_id: make_load(peer_id, running=index) for index, peer_id in enumerate(caches)}
    before, after = _make_state(metrics), _make_state(metrics)
    for peer_id in caches:
        before.announce(make_card(peer_id), 0.0)
        before.apply(loads[peer_id], 0.0)
    for number, chain in enumerate(chains):
        peer_id = f"u{number % 4}"
        assert before.apply(caches[peer_id].use(chain), 0.0) is None
    for peer_id, cache in caches.items():
        after.announce(make_card(peer_id), 0.0)
        assert [address.peer_id for address, _ in after.wanted_snapshots(0.0)] == [peer_id]
        after.apply(cache.snapshot(), 0.0)
        after.apply(loads[peer_id], 0.0)
    assert after.num_index_blocks == before.num_index_blocks == 4 * 60
    for query_id, chain in enumerate(chains):
        query = make_query(chain, query_id=query_id)
        assert before.decide(query, source="i", now_s=1.0) == after.decide(query, source="i", now_s=1.0)


def test_what_is_expected_to_be_cached_is_counted_for_what_engines_find(
    state: RouterState, metrics: MemoryMetrics
) -> None:
    hashes = tuple(range(10))
    state.announce(make_card("a"), 0.0)
    block_size = make_card("a").block_size
    state.apply(CacheModel("a", 100).use(hashes[:4]), 0.0)
    state.decide(make_query(hashes, num_tokens=10 * block_size), source="i", now_s=0.0)
    assert metrics.value(ROUTER_PROMPT_TOKENS) == 10 * block_size
    assert metrics.value(ROUTER_EXPECTED_HITS) == 4 * block_size


def test_members_that_come_and_go_are_counted_by_how(state: RouterState, metrics: MemoryMetrics) -> None:
    state.announce(make_card("a", "decode"), 0.0)
    state.announce(make_card("b", "decode"), 0.0)
    state.announce(make_card("b", "decode", epoch=2), 0.1)
    state.withdraw("b")
    state.withdraw("b")
    state.expire(100.0)
    found = {
        change: metrics.value(ROUTER_MEMBER_CHANGES, change=change) for change in ("joined", "lost", "left", "silent")
    }
    assert found == {"joined": 3, "lost": 1, "left": 1, "silent": 1}
    assert metrics.value(ROUTER_MEMBER_CHANGES, kind="decode") == 6


def test_imbalance_is_the_busiest_ones_share_of_the_mean(state: RouterState, metrics: MemoryMetrics) -> None:
    for peer_id in ("a", "b"):
        state.announce(make_card(peer_id), 0.0)
    assert metrics.value(ROUTER_IMBALANCE, group="unified") == 1.0
    state.decide(make_query(num_tokens=500), source="i", now_s=0.0)
    state.announce(make_card("b"), 1.0)
    assert metrics.value(ROUTER_IMBALANCE, group="unified") == pytest.approx(2.0)
    state.withdraw("a")
    state.withdraw("b")
    state.announce(_ingress(), 2.0)
    assert metrics.value(ROUTER_IMBALANCE, group="unified") == 1.0, "of nobody nothing is said any more"


def test_engines_are_not_compared_at_every_announcement(state: RouterState, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []

    def estimate(peer_id: str, now_s: float) -> LoadEstimate:
        looked_at.append(peer_id)
        return LoadEstimate()

    monkeypatch.setattr(state._loads, "estimate", estimate)
    for half_seconds in range(4):
        for number in range(30):
            state.announce(make_card(f"e{number}"), 0.5 * half_seconds)
    assert 0 < len(looked_at) <= 2 * 30
