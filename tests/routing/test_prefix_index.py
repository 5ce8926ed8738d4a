"""PrefixIndex: exact after any stream of events with losses and repetitions, bounded, deaf to other epochs."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.messages.cluster import CacheEvents, CacheSnapshot
from atom_cluster.routing.prefix_index import PrefixIndex
from tests.routing.builders import CacheModel


def _index(*peer_ids: str, max_blocks: int = 10_000) -> PrefixIndex:
    index = PrefixIndex(max_blocks)
    for peer_id in peer_ids:
        index.track(peer_id, 1)
    return index


def _stored(peer_id: str, *hashes: int, first_seq: int = 0, epoch: int = 1) -> CacheEvents:
    return CacheEvents(peer_id=peer_id, epoch=epoch, first_seq=first_seq, stored=hashes)


def test_the_longest_leading_run_counts_for_each_replica() -> None:
    index = _index("a", "b", "c", "d")
    index.apply_events(_stored("a", 1, 2, 3))
    index.apply_events(_stored("b", 1, 3, 4))
    index.apply_events(_stored("c", 2, 3))
    assert index.matched_blocks((1, 2, 3, 4)) == {"a": 3, "b": 1}
    assert index.matched_blocks(()) == {}
    assert index.num_entries == 8


def test_a_hash_in_both_lists_was_stored_and_then_removed() -> None:
    index = _index("a")
    index.apply_events(CacheEvents(peer_id="a", epoch=1, first_seq=0, stored=(1, 2), removed=(2,)))
    assert index.matched_blocks((1, 2)) == {"a": 1}


def test_a_new_replica_needs_a_snapshot_unless_its_events_start_at_zero() -> None:
    index = _index("old", "fresh")
    assert index.needs_snapshot("old")
    assert index.needs_snapshot("fresh")
    assert index.apply_events(_stored("old", 7, first_seq=40)) == "gap"
    assert index.apply_events(_stored("fresh", 7)) == "applied"
    assert index.needs_snapshot("old")
    assert not index.needs_snapshot("fresh")
    assert not index.needs_snapshot("unknown")


def test_a_lost_event_asks_for_a_snapshot_and_keeps_what_is_known() -> None:
    index = _index("a")
    index.apply_events(_stored("a", 1, 2))
    assert index.apply_events(_stored("a", 4, first_seq=3)) == "gap"
    assert index.apply_events(_stored("a", 5, first_seq=4)) == "gap"
    assert index.matched_blocks((1, 2, 3)) == {"a": 2}
    snapshot = CacheSnapshot(peer_id="a", epoch=1, next_seq=5, hashes=(1, 2, 3, 4, 5))
    assert index.apply_snapshot(snapshot) == "applied"
    assert not index.needs_snapshot("a")
    assert index.matched_blocks((1, 2, 3, 4, 5)) == {"a": 5}


def test_a_snapshot_older_than_the_events_seen_does_not_settle_a_gap() -> None:
    index = _index("a")
    index.apply_events(_stored("a", 9, first_seq=10))
    assert index.apply_snapshot(CacheSnapshot(peer_id="a", epoch=1, next_seq=5, hashes=(1,))) == "gap"
    assert index.matched_blocks((9,)) == {"a": 1}


def test_events_that_a_snapshot_includes_are_skipped_even_in_part() -> None:
    index = _index("a")
    index.apply_snapshot(CacheSnapshot(peer_id="a", epoch=1, next_seq=3, hashes=(3,)))
    overlapping = CacheEvents(peer_id="a", epoch=1, first_seq=0, stored=(1, 2, 3), removed=(1, 3))
    assert index.apply_events(overlapping) == "applied"
    assert index.num_blocks("a") == 0
    assert index.apply_events(_stored("a", 6, first_seq=5)) == "applied"


def test_another_epoch_is_ignored_and_a_new_incarnation_starts_empty() -> None:
    index = _index("a")
    index.apply_events(_stored("a", 1))
    assert index.apply_events(_stored("a", 2, first_seq=1, epoch=2)) == "ignored"
    assert index.apply_snapshot(CacheSnapshot(peer_id="a", epoch=2, next_seq=0, hashes=())) == "ignored"
    assert index.apply_events(_stored("stranger", 2)) == "ignored"
    index.track("a", 1)
    assert index.matched_blocks((1,)) == {"a": 1}
    index.track("a", 2)
    assert index.matched_blocks((1,)) == {}
    assert index.apply_events(_stored("a", 3, first_seq=1)) == "ignored"


def test_a_forgotten_replica_leaves_nothing() -> None:
    index = _index("a", "b")
    index.apply_events(_stored("a", 1))
    index.forget("a")
    index.forget("a")
    assert index.num_entries == 0
    assert index.matched_blocks((1,)) == {}


def test_the_index_is_bounded_and_keeps_prefixes_in_use() -> None:
    index = _index("a", "b", max_blocks=400)
    hot = tuple(range(20))
    index.apply_events(_stored("a", *hot))
    for start in range(1000, 3000, 50):
        index.apply_events(_stored("a", *range(start, start + 50), first_seq=start - 980))
        assert index.matched_blocks(hot) == {"a": 20}
        assert index.num_entries <= 200
    assert index.matched_blocks(tuple(range(1000, 1050))) == {}
    index.apply_snapshot(CacheSnapshot(peer_id="b", epoch=1, next_seq=10**6, hashes=tuple(range(5000))))
    assert index.num_entries <= 400


def test_a_replica_that_joins_gets_its_share_of_the_bound() -> None:
    index = _index("a", max_blocks=400)
    index.apply_events(_stored("a", *range(390)))
    index.track("b", 1)
    assert index.num_blocks("a") <= 200
    index.apply_events(_stored("b", *range(200)))
    assert index.num_entries <= 400


_operations = st.lists(
    st.tuples(
        st.sampled_from(["use", "use", "use", "evict", "restart"]),
        st.integers(0, 5),
        st.integers(1, 12),
        st.sampled_from(["delivered", "delivered", "delivered", "lost", "twice"]),
    ),
    max_size=40,
)


@given(_operations)
@settings(max_examples=150, deadline=None)
def test_after_any_losses_one_snapshot_makes_the_index_equal_to_the_cache(
    operations: list[tuple[str, int, int, str]],
) -> None:
    cache, index = CacheModel("a", capacity=25), _index("a")
    chains = [tuple(range(100 * chain, 100 * chain + 12)) for chain in range(6)]
    for operation, chain, length, fate in operations:
        if operation == "restart":
            index = _index("a")
            continue
        events = cache.use(chains[chain][:length]) if operation == "use" else cache.evict(length)
        for _ in range({"delivered": 1, "lost": 0, "twice": 2}[fate]):
            index.apply_events(events)
    final = cache.evict(1)
    if index.apply_events(final) != "applied":
        index.apply_snapshot(cache.snapshot())
    assert not index.needs_snapshot("a")
    for chain_hashes in chains:
        run = cache.leading_run(chain_hashes)
        assert index.matched_blocks(chain_hashes) == ({"a": run} if run else {})
    assert index.num_blocks("a") == len(cache.snapshot().hashes)
