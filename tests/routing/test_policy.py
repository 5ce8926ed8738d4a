"""The policy: caches against load on both sides, pairs of equal fingerprints, and a true reason."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.config.routing import RoutingConfig
from atom_cluster.messages.cluster import EngineSpeed, Role
from atom_cluster.routing.candidates import Candidate, CostModel
from atom_cluster.routing.load_view import LoadEstimate
from atom_cluster.routing.policy import REASONS, Choice, RoutingPolicy
from atom_cluster.routing.prompt_place import PLACES
from tests.routing.builders import BLOCK_SIZE, make_card, make_query

_MIN_REMOTE_TOKENS = 16
UNKNOWN = EngineSpeed()


def _candidate(
    peer_id: str,
    role: Role = "unified",
    *,
    cached: int = 0,
    requests: int = 0,
    tokens: int = 0,
    free_blocks: int | None = None,
    fingerprint: str = "f",
    order: int = 0,
    speed: EngineSpeed = UNKNOWN,
) -> Candidate:
    load = LoadEstimate(num_requests=requests, num_waiting_tokens=tokens, num_free_blocks=free_blocks, speed=speed)
    card = make_card(peer_id, role, fingerprint=fingerprint)
    return Candidate(card=card, load=load, cached_blocks=cached, placed_order=order)


def _policy(**fields: object) -> RoutingPolicy:
    conditional = bool(fields.pop("conditional", True))
    config = RoutingConfig.model_validate(fields)
    return RoutingPolicy(config, min_remote_tokens=_MIN_REMOTE_TOKENS, conditional_prefill=conditional)


def _choose(*candidates: Candidate, num_blocks: int = 100, **fields: object) -> Choice:
    choice = _policy(**fields).choose(make_query(range(num_blocks)), candidates)
    assert choice is not None
    return choice


def _ids(choice: Choice) -> tuple[str | None, str]:
    prefill = None if choice.prefill is None else choice.prefill.card.address.peer_id
    return prefill, choice.decode.card.address.peer_id


def test_the_replica_with_the_prefix_is_chosen_among_equally_loaded_ones() -> None:
    choice = _choose(_candidate("a"), _candidate("b", cached=80), _candidate("c", cached=20))
    assert (_ids(choice), choice.reason, choice.is_local) == ((None, "b"), "prefix", True)


def test_a_small_hit_is_not_worth_a_queue() -> None:
    choice = _choose(_candidate("busy", cached=2, tokens=500), _candidate("idle", tokens=400), num_blocks=100)
    assert (_ids(choice), choice.reason) == ((None, "idle"), "load")


def test_a_hot_prefix_is_spread_when_its_owner_is_far_above_the_mean() -> None:
    others = [_candidate(f"idle{i}") for i in range(7)]
    choice = _choose(_candidate("owner", cached=100, tokens=5000), *others)
    assert choice.reason == "hot_prefix_spread"
    assert choice.decode.card.address.peer_id != "owner"


def test_a_larger_load_factor_lets_a_busy_owner_keep_its_hits() -> None:
    candidates = [_candidate("owner", cached=1000, tokens=20_000), _candidate("idle", tokens=10_000)]
    assert _choose(*candidates, num_blocks=1000, load_factor=1.5).reason == "prefix"
    candidates = [_candidate("owner", cached=1000, tokens=26_000), _candidate("idle", tokens=10_100)]
    assert _choose(*candidates, num_blocks=200, load_factor=1.0).reason == "hot_prefix_spread"


def test_prefill_and_decode_are_each_chosen_by_their_own_cache_and_load() -> None:
    choice = _choose(
        _candidate("p0", "prefill", tokens=9000),
        _candidate("p1", "prefill", cached=60),
        _candidate("d0", "decode", requests=50),
        _candidate("d1", "decode", requests=2),
    )
    assert (_ids(choice), choice.reason, choice.is_local) == (("p1", "d1"), "prefix", False)


def test_decode_that_has_nearly_all_of_the_prompt_is_expected_to_compute_the_rest() -> None:
    choice = _choose(_candidate("p", "prefill"), _candidate("d0", "decode"), _candidate("d1", "decode", cached=100))
    assert (_ids(choice), choice.is_local, choice.reason) == (("p", "d1"), True, "prefix")


def test_decode_alone_says_why() -> None:
    decode = _candidate("d", "decode")
    assert _choose(decode).reason == "no_prefill"
    mismatch = _choose(decode, _candidate("p", "prefill", fingerprint="other"))
    assert (_ids(mismatch), mismatch.reason) == ((None, "d"), "fingerprint_mismatch")


def test_only_equal_fingerprints_pair_and_the_cheaper_group_wins() -> None:
    candidates = [
        _candidate("p-old", "prefill", fingerprint="old", tokens=5000),
        _candidate("d-old", "decode", fingerprint="old"),
        _candidate("p-new", "prefill", fingerprint="new"),
        _candidate("d-new", "decode", fingerprint="new"),
    ]
    assert _ids(_choose(*candidates)) == ("p-new", "d-new")


def test_a_unified_replica_gets_no_prefill_partner() -> None:
    choice = _choose(_candidate("u", "unified"), _candidate("p", "prefill"))
    assert (_ids(choice), choice.reason) == ((None, "u"), "load")


def test_while_nobody_decodes_prefill_replicas_serve_whole_requests() -> None:
    choice = _choose(_candidate("p0", "prefill", tokens=900), _candidate("p1", "prefill"))
    assert (_ids(choice), choice.reason, choice.place) == ((None, "p1"), "no_decode", "decode_away")
    choice = _choose(_candidate("p0", "prefill", cached=90), _candidate("p1", "prefill"))
    assert choice.decode.card.address.peer_id == "p0"
    turns = _policy(policy="round_robin")
    both = [_candidate("p0", "prefill"), _candidate("p1", "prefill")]
    choices = [turns.choose(make_query(range(3)), both) for _ in range(4)]
    assert [_ids(choice)[1] for choice in choices if choice] == ["p0", "p1", "p0", "p1"]
    assert _choose(_candidate("p", "prefill"), _candidate("d", "decode", requests=500)).place != "decode_away"


def test_nobody_may_decode_nobody_is_chosen() -> None:
    assert _policy(prefill_may_decode=False).choose(make_query(range(3)), [_candidate("p", "prefill")]) is None
    assert _policy(policy="round_robin").choose(make_query(range(3)), []) is None


SPEED = EngineSpeed(prompt_s=((100, 0.1), (1000, 1.0)), chunk_tokens=8192)


@pytest.mark.parametrize("policy", ["prefix_and_load", "least_loaded", "round_robin"])
def test_a_busy_prefill_replica_is_not_waited_for_longer_than_decode_takes(policy: str) -> None:
    decode = _candidate("d", "decode", speed=SPEED)
    idle, busy = _candidate("p", "prefill", speed=SPEED), _candidate("p", "prefill", tokens=900, speed=SPEED)
    chosen = _choose(idle, decode, policy=policy)
    assert (_ids(chosen), chosen.place, chosen.is_local) == (("p", "d"), "remote", False)
    chosen = _choose(busy, decode, policy=policy)
    assert (_ids(chosen), chosen.place, chosen.is_local) == ((None, "d"), "prefill_busy", True)
    assert chosen.reason != "no_prefill"
    chosen = _choose(busy, decode, policy=policy, conditional=False)
    assert (_ids(chosen), chosen.place) == (("p", "d"), "remote")


def test_where_both_have_the_prefix_is_taken_into_account() -> None:
    busy = {"tokens": 400, "speed": SPEED}
    decode = _candidate("d", "decode", speed=SPEED)
    assert _choose(_candidate("p", "prefill", **busy), decode).place == "prefill_busy"  # type: ignore[arg-type]
    assert _choose(_candidate("p", "prefill", cached=90, **busy), decode).place == "remote"  # type: ignore[arg-type]


def test_a_replica_without_room_is_avoided() -> None:
    choice = _choose(_candidate("full", free_blocks=0), _candidate("roomy", requests=3, free_blocks=500))
    assert choice.decode.card.address.peer_id == "roomy"


def test_least_loaded_ignores_caches() -> None:
    choice = _choose(_candidate("a", cached=100, tokens=10), _candidate("b"), policy="least_loaded")
    assert (_ids(choice), choice.reason) == ((None, "b"), "load")


def test_round_robin_takes_turns_on_both_sides() -> None:
    candidates = [_candidate(f"d{i}", "decode") for i in range(3)] + [_candidate(f"p{i}", "prefill") for i in range(2)]
    policy = _policy(policy="round_robin")
    choices = [policy.choose(make_query(range(9)), candidates) for _ in range(6)]
    assert {choice.reason for choice in choices if choice} == {"round_robin"}
    assert {_ids(choice) for choice in choices if choice} == {(f"p{i}", f"d{j}") for i in range(2) for j in range(3)}


def test_ties_go_to_whoever_was_chosen_least_recently() -> None:
    assert _ids(_choose(_candidate("a", order=5), _candidate("b", order=2), _candidate("c", order=9))) == (None, "b")


_candidates = st.lists(
    st.builds(
        _candidate,
        st.uuids().map(str),
        st.sampled_from(["prefill", "decode", "unified"]),
        cached=st.integers(0, 50),
        requests=st.integers(0, 300),
        tokens=st.integers(0, 100_000),
        free_blocks=st.none() | st.integers(0, 1000),
        fingerprint=st.sampled_from(["f", "g"]),
    ),
    max_size=12,
)


@given(_candidates, st.sampled_from(["prefix_and_load", "least_loaded", "round_robin"]))
@settings(max_examples=200, deadline=None)
def test_any_choice_is_a_valid_pair_with_a_known_reason(candidates: list[Candidate], policy: str) -> None:
    choice = _policy(policy=policy).choose(make_query(range(50)), candidates)
    assert (choice is None) == (not candidates)
    if choice is None:
        return
    assert choice.reason in REASONS and choice.place in PLACES
    is_decode_away = all(candidate.card.role == "prefill" for candidate in candidates)
    assert (choice.decode.card.role == "prefill") == is_decode_away == (choice.place == "decode_away")
    if choice.prefill is None:
        assert choice.is_local
    else:
        assert choice.prefill.card.role == "prefill"
        assert choice.decode.card.role == "decode"
        assert choice.prefill.card.fingerprint == choice.decode.card.fingerprint


@given(_candidates, st.integers(1, 200_000))
@settings(max_examples=200, deadline=None)
def test_a_replica_out_of_bounds_never_wins_by_its_cache(candidates: list[Candidate], num_tokens: int) -> None:
    query = make_query(range(min(50, num_tokens // BLOCK_SIZE)), num_tokens=num_tokens)
    choice = _policy(load_factor=1.5).choose(query, candidates)
    if choice is None or choice.decode.counted_blocks == 0:
        return
    costs = CostModel(query, RoutingConfig().output_token_weight)
    decoders = [candidate for candidate in candidates if candidate.card.role != "prefill"]
    loads = [costs.queued(candidate) for candidate in decoders or candidates]
    bound = 1.5 * sum(loads) / len(loads) + costs.own_load(choice.decode)
    assert costs.queued(choice.decode) <= bound


@pytest.mark.parametrize("idle_requests", [0, 5])
def test_more_load_never_makes_a_replica_more_attractive(idle_requests: int) -> None:
    for extra in range(0, 40, 4):
        busy = _candidate("busy", cached=10, requests=idle_requests + extra, order=1)
        choice = _choose(busy, _candidate("idle", cached=10, requests=idle_requests))
        assert choice.decode.card.address.peer_id == "idle"
