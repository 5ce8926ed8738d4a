from __future__ import annotations

import pytest

from atom_cluster.kv_cache.block_manager import BlockManager, BlockTable
from atom_cluster.kv_cache.prefix_hash import hash_blocks, seed_of

SEED = seed_of("model")
PROMPT = tuple(range(100, 110))


def make_manager(num_blocks: int = 8, *, prefix_caching: bool = True) -> BlockManager:
    return BlockManager(num_blocks=num_blocks, block_size=4, seed=SEED, prefix_caching=prefix_caching)


def compute(manager: BlockManager, tokens: tuple[int, ...]) -> BlockTable:
    """A table whose tokens have all been computed and offered."""
    table = manager.match(tokens, "running")
    assert manager.extend(table, len(tokens)) is not None
    manager.confirm(table, tokens, len(tokens))
    manager.pool.check_integrity()
    return table


def test_a_table_grows_by_whole_blocks() -> None:
    manager = make_manager()
    table = manager.match(PROMPT, "running")
    assert [manager.missing(table, num_tokens) for num_tokens in (0, 1, 4, 5)] == [(0,), (1,), (1,), (2,)]
    assert manager.extend(table, 5) == (tuple(table.block_ids),)
    assert len(table.block_ids) == 2
    assert manager.extend(table, 8) == ()
    assert manager.extend(table, 9) == ((table.block_ids[2],),)


def test_a_table_that_cannot_grow_stays_as_it_is() -> None:
    manager = make_manager(2)
    table = manager.match(PROMPT, "running")
    manager.extend(table, 4)
    before = list(table.block_ids)
    assert manager.extend(table, 10) is None
    assert table.block_ids == before
    assert manager.pool.num_available == 1


def test_blocks_are_shared_with_a_request_that_begins_with_the_same_tokens() -> None:
    manager = make_manager()
    first = compute(manager, PROMPT)
    second = manager.match((*PROMPT[:8], 7, 7), "running")
    assert second.block_ids == first.block_ids[:2]
    assert manager.match((*PROMPT[:7], 7, 7), "running").block_ids == first.block_ids[:1]
    assert manager.match((7, *PROMPT[1:]), "running").block_ids == []


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(4, 0), (5, 1), (8, 1), (9, 2)])
def test_the_last_token_of_a_prompt_is_never_taken_from_the_cache(num_tokens: int, num_blocks: int) -> None:
    manager = make_manager()
    compute(manager, PROMPT)
    assert len(manager.match(PROMPT[:num_tokens], "running").block_ids) == num_blocks


def test_only_full_blocks_of_computed_tokens_are_offered() -> None:
    manager = make_manager()
    table = manager.match(PROMPT, "running")
    manager.extend(table, len(PROMPT))
    for num_computed, num_offered in ((3, 0), (4, 1), (7, 1), (10, 2), (12, 2)):
        manager.confirm(table, PROMPT, num_computed)
        assert len(manager.pool.cached_hashes) == num_offered
    assert manager.pool.cached_hashes == hash_blocks(PROMPT, 4, SEED)


def test_blocks_that_fill_while_decoding_are_offered_too() -> None:
    manager = make_manager()
    table = compute(manager, PROMPT)
    longer = (*PROMPT, 1, 2)
    manager.confirm(table, longer, 12)
    assert manager.match((*longer, 3), "running").block_ids == table.block_ids


def test_a_request_that_found_blocks_offers_only_its_own() -> None:
    manager = make_manager()
    compute(manager, PROMPT)
    manager.pool.take_changes()
    longer = (*PROMPT, 1, 2, 3)
    table = compute(manager, longer)
    assert manager.pool.take_changes() == (2, hash_blocks(longer, 4, SEED)[2:], ())
    assert table.num_named == 3


def test_released_blocks_are_found_again_and_an_evicted_parent_hides_its_children() -> None:
    manager = make_manager(3)
    table = compute(manager, PROMPT)
    parent, child, partial = table.block_ids
    manager.release(table)
    assert (table.block_ids, table.num_named, table.last_prefix) == ([], 0, None)
    assert manager.count_matching(PROMPT) == 8
    child_holder = manager.match(PROMPT, "running")
    manager.pool.release([parent], "running")
    child_holder.block_ids.remove(parent)
    assert sorted(manager.pool.acquire(2, "leased") or []) == sorted([parent, partial])
    assert manager.count_matching(PROMPT) == 0
    manager.pool.release([parent, partial], "leased")
    again = manager.match(PROMPT[:5], "running")
    manager.extend(again, 5)
    manager.confirm(again, PROMPT, 4)
    found = manager.match(PROMPT, "running")
    assert found.block_ids == [again.block_ids[0], child]
    manager.pool.check_integrity()


def test_renaming_a_table_moves_all_its_blocks() -> None:
    manager = make_manager()
    table = compute(manager, PROMPT)
    manager.rename(table, "leased")
    assert manager.pool.counts()["leased"] == 3
    manager.release(table)
    assert manager.pool.counts() == {"free": 6, "cached": 2, "running": 0, "leased": 0, "arriving": 0}


def test_releasing_a_table_twice_gives_back_nothing_the_second_time() -> None:
    manager = make_manager()
    table = compute(manager, PROMPT)
    manager.release(table)
    before = manager.pool.counts()
    manager.release(table)
    assert manager.pool.counts() == before


def test_a_copied_claim_cannot_be_released_twice() -> None:
    manager = make_manager()
    table = compute(manager, PROMPT)
    copy = BlockTable("running", list(table.groups))
    manager.release(table)
    with pytest.raises(AssertionError, match="not running"):
        manager.release(copy)


def test_without_prefix_caching_nothing_is_found_or_kept() -> None:
    manager = make_manager(prefix_caching=False)
    table = compute(manager, PROMPT)
    assert manager.match(PROMPT, "running").block_ids == []
    manager.release(table)
    assert manager.pool.counts()["free"] == 8
    assert manager.pool.take_changes() == (0, (), ())
