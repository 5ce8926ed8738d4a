from __future__ import annotations

import pytest

from atom_cluster.kv_cache.block_pool import BlockPool, BlockState, Holder, Prefix
from atom_cluster.kv_cache.prefix_hash import pack_tokens


def prefix_of(name: int, *, parent: Prefix | None = None, tokens: tuple[int, ...] | None = None) -> Prefix:
    return Prefix(name, pack_tokens(tokens or (name, name)), parent)


def held(pool: BlockPool, num_blocks: int = 1) -> list[int]:
    blocks = pool.acquire(num_blocks, "running")
    assert blocks is not None
    return blocks


def cache_idle(pool: BlockPool, *prefixes: Prefix) -> list[int]:
    """Blocks that nobody holds and that have these prefixes, the first being the least recently used."""
    blocks = held(pool, len(prefixes))
    for block, prefix in zip(blocks, prefixes):
        pool.cache(block, prefix)
        pool.release([block], "running")
    return blocks


def ledger(pool: BlockPool) -> dict[BlockState, int]:
    """Non-zero counts."""
    pool.check_integrity()
    counts = pool.counts()
    assert sum(counts.values()) == pool.num_blocks
    return {state: count for state, count in counts.items() if count}


def is_found(pool: BlockPool, prefix: Prefix) -> bool:
    return pool.find(prefix.hash, prefix.tokens, prefix.parent) is not None


def test_blocks_are_handed_out_once_until_there_are_no_more() -> None:
    pool = BlockPool(4)
    assert sorted(held(pool, 3) + held(pool, 1)) == [0, 1, 2, 3]
    assert pool.num_available == 0
    assert pool.acquire(1, "running") is None
    assert pool.acquire(0, "running") == []
    assert ledger(pool) == {"running": 4}


def test_a_request_for_too_many_blocks_changes_nothing() -> None:
    pool = BlockPool(4)
    cache_idle(pool, prefix_of(1))
    assert pool.acquire(5, "leased") is None
    assert ledger(pool) == {"free": 3, "cached": 1}
    assert is_found(pool, prefix_of(1))


def test_a_block_takes_the_state_of_its_most_demanding_holder() -> None:
    pool = BlockPool(1)
    (block,) = held(pool)
    others: tuple[Holder, ...] = ("leased", "arriving")
    for holder in others:
        pool.share(block, holder)
    seen = [ledger(pool)]
    order: tuple[Holder, ...] = ("arriving", "running", "leased")
    for holder in order:
        pool.release([block], holder)
        seen.append(ledger(pool))
    assert seen == [{"arriving": 1}, {"running": 1}, {"leased": 1}, {"free": 1}]


def test_a_claim_can_change_its_kind() -> None:
    pool = BlockPool(3)
    blocks = held(pool, 2)
    pool.change_holder(blocks, "running", "leased")
    assert ledger(pool) == {"free": 1, "leased": 2}
    with pytest.raises(AssertionError, match="not running"):
        pool.change_holder(blocks, "running", "leased")


@pytest.mark.parametrize("is_cached", [True, False])
def test_releasing_twice_or_under_another_kind_asserts_and_changes_nothing(is_cached: bool) -> None:
    pool = BlockPool(2)
    (block,) = held(pool)
    if is_cached:
        pool.cache(block, prefix_of(1))
    with pytest.raises(AssertionError, match="not leased"):
        pool.release([block], "leased")
    pool.release([block], "running")
    before = ledger(pool)
    with pytest.raises(AssertionError, match="not running"):
        pool.release([block], "running")
    assert ledger(pool) == before


def test_a_block_that_is_held_is_not_evicted_and_one_shared_again_is_not_idle() -> None:
    pool = BlockPool(2)
    shared, _ = cache_idle(pool, prefix_of(1), prefix_of(2))
    pool.share(shared, "running")
    assert ledger(pool) == {"cached": 1, "running": 1}
    assert held(pool) != [shared]
    assert pool.acquire(1, "running") is None
    assert is_found(pool, prefix_of(1))
    assert not is_found(pool, prefix_of(2))


def test_free_blocks_go_before_cached_ones_and_the_least_recently_used_of_these_first() -> None:
    pool = BlockPool(4)
    names = [prefix_of(1), prefix_of(2), prefix_of(3)]
    first, second, third = cache_idle(pool, *names)
    pool.share(first, "running")
    pool.release([first], "running")
    (free,) = set(range(4)) - {first, second, third}
    assert [held(pool)[0] for _ in range(4)] == [free, second, third, first]
    assert ledger(pool) == {"running": 4}


def test_of_blocks_released_together_the_last_is_evicted_first() -> None:
    pool = BlockPool(3)
    blocks = held(pool, 3)
    parent: Prefix | None = None
    for name, block in enumerate(blocks):
        parent = prefix_of(name, parent=parent)
        pool.cache(block, parent)
    pool.release(blocks, "running")
    assert held(pool, 3) == blocks[::-1]


def test_a_prefix_is_found_while_held_and_after_until_it_is_evicted() -> None:
    pool = BlockPool(1)
    (block,) = held(pool)
    prefix = prefix_of(1)
    assert not is_found(pool, prefix)
    pool.cache(block, prefix)
    assert pool.find(prefix.hash, prefix.tokens, None) == (block, prefix)
    pool.release([block], "running")
    assert is_found(pool, prefix)
    held(pool)
    assert not is_found(pool, prefix)
    assert pool.cached_hashes == ()


def test_a_hash_alone_finds_nothing() -> None:
    pool = BlockPool(2)
    parent = prefix_of(1)
    cache_idle(pool, parent, prefix_of(2, parent=parent))
    assert is_found(pool, prefix_of(2, parent=prefix_of(1)))
    assert not is_found(pool, prefix_of(1, tokens=(5, 5)))
    assert not is_found(pool, prefix_of(2))
    assert not is_found(pool, prefix_of(2, parent=prefix_of(1, tokens=(5, 5))))
    assert not is_found(pool, prefix_of(2, parent=prefix_of(1, parent=prefix_of(0))))


def test_of_two_blocks_with_one_hash_the_first_stays_the_one_that_is_found() -> None:
    pool = BlockPool(3)
    one, same, colliding = held(pool, 3)
    pool.cache(one, prefix_of(1))
    pool.cache(same, prefix_of(1))
    pool.cache(colliding, prefix_of(1, tokens=(5, 5)))
    pool.release([same, colliding, one], "running")
    assert ledger(pool) == {"free": 2, "cached": 1}
    found = pool.find(1, prefix_of(1).tokens, None)
    assert found is not None
    assert found[0] == one


def test_only_a_held_block_can_be_cached() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="before it is released"):
        pool.cache(0, prefix_of(1))
    assert ledger(pool) == {"free": 1}


def test_a_block_that_nobody_holds_and_that_is_not_cached_cannot_be_shared() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="free"):
        pool.share(0, "running")
    assert ledger(pool) == {"free": 1}


def test_changes_are_told_once_and_numbered_by_those_before() -> None:
    pool = BlockPool(2)
    cache_idle(pool, prefix_of(1), prefix_of(2))
    assert pool.take_changes() == (0, (1, 2), ())
    assert pool.take_changes() == (2, (), ())
    held(pool)
    assert pool.take_changes() == (2, (), (1,))
    assert pool.num_events == 3
    assert pool.cached_hashes == (2,)


def test_what_came_and_went_between_two_tellings_is_no_change() -> None:
    pool = BlockPool(1)
    cache_idle(pool, prefix_of(1))
    cache_idle(pool, prefix_of(2))
    assert pool.take_changes() == (0, (2,), ())
    cache_idle(pool, prefix_of(3))
    cache_idle(pool, prefix_of(2))
    assert pool.take_changes() == (1, (), ())
    assert pool.num_events == 1
