"""Block tables of models with windows and states: what is kept, given back, found again and handed over."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.errors import ConfigError
from atom_cluster.kv_cache.block_manager import BlockManager, BlockTable
from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.kv_cache.page_groups import NO_PAGE, ColumnPages, StatePages
from atom_cluster.kv_cache.prefix_hash import seed_of

SIZE = 4
PROMPT = tuple(range(100, 122))  # five full blocks and two tokens


def window(size: int, num_pages: int = 32) -> PageGroup:
    return PageGroup(kind="window", window=size, num_pages=num_pages)


def states(num_pages: int = 32) -> PageGroup:
    return PageGroup(kind="state", window=None, num_pages=num_pages)


def make_manager(
    *groups: PageGroup, num_blocks: int = 32, max_drafts: int = 0, prefix_caching: bool = True
) -> BlockManager:
    return BlockManager(
        num_blocks=num_blocks,
        block_size=SIZE,
        seed=seed_of("model"),
        prefix_caching=prefix_caching,
        other_groups=groups,
        max_drafts=max_drafts,
    )


def columns(table: BlockTable, group: int = 1) -> list[int]:
    pages = table.groups[group]
    assert isinstance(pages, ColumnPages)
    return pages.page_ids


def state(table: BlockTable, group: int = 1) -> StatePages:
    pages = table.groups[group]
    assert isinstance(pages, StatePages)
    return pages


def step(manager: BlockManager, table: BlockTable, tokens: Sequence[int], end: int) -> tuple[tuple[int, ...], ...]:
    """A step up to `end` is planned, and its result comes."""
    new = manager.extend(table, end)
    assert new is not None
    manager.plan_checkpoint(table, end)
    manager.confirm(table, tokens, end)
    manager.check_integrity()
    return new


def compute(manager: BlockManager, tokens: Sequence[int], ends: Sequence[int] = ()) -> BlockTable:
    """Match a prompt and compute it in steps that end as told."""
    table = manager.match(tokens, "running")
    for end in (*ends, len(tokens)):
        step(manager, table, tokens, end)
    return table


# --- windows


def test_columns_that_no_later_token_sees_are_given_back() -> None:
    manager = make_manager(window(6))
    table = manager.match(PROMPT, "running")
    manager.extend(table, 22)
    pages = list(columns(table))
    for num_confirmed, num_absent in ((8, 0), (9, 1), (12, 1), (13, 2), (22, 4)):
        manager.confirm(table, PROMPT, num_confirmed)
        assert columns(table) == [NO_PAGE] * num_absent + pages[num_absent:]
    assert manager.other_counts()["window 6"] == {"free": 26, "cached": 4, "running": 2, "leased": 0, "arriving": 0}
    assert len(table.block_ids) == 6
    assert manager.extend(table, 25) == ((6,), (6,))
    manager.release(table)
    manager.check_integrity()


def test_a_prefix_is_found_as_far_as_the_window_before_its_end_is_cached() -> None:
    manager = make_manager(window(6))
    manager.release(compute(manager, PROMPT))
    table = manager.match(PROMPT, "running")
    assert len(table.block_ids) == 5
    # The token at 20 sees 15 to 20, so columns 3 and 4 are needed.
    assert columns(table)[:3] == [NO_PAGE] * 3
    assert len(columns(table)) == 5
    assert table.at_entry() == (tuple(table.block_ids), tuple(columns(table)))
    manager.check_integrity()


def test_eviction_in_one_group_alone_shortens_what_is_found() -> None:
    manager = make_manager(window(6, num_pages=8))
    manager.release(compute(manager, PROMPT, (16, 20)))
    window_pool = manager._groups[1].pool
    # Three pages are free. Those behind the window were given back first, and so are evicted first: columns 0 to 2.
    assert window_pool.acquire(6, "leased") is not None
    assert manager.count_matching(PROMPT) == 20
    assert window_pool.acquire(1, "leased") is not None
    assert manager.count_matching(PROMPT) == 0
    assert manager.pool.counts()["cached"] == 5
    manager.check_integrity()


def test_a_window_of_one_token_needs_nothing_behind_a_block_boundary() -> None:
    manager = make_manager(window(1))
    manager.release(compute(manager, PROMPT))
    table = manager.match(PROMPT, "running")
    assert columns(table) == [NO_PAGE] * 5
    assert manager.columns_behind(20) == {}
    assert manager.columns_behind(22) == {1: range(5, 6)}


def test_extending_takes_pages_of_all_groups_or_of_none() -> None:
    manager = make_manager(window(6, num_pages=4), num_blocks=8)
    table = manager.match(PROMPT, "running")
    assert manager.extend(table, 20) is None
    assert manager.missing(table, 20) == (5, 5)
    assert manager.missing(table, 20, num_next=16) == (5, 4)
    assert manager.pool.num_available == 8
    assert manager.extend(table, 20, num_next=16) is not None
    assert (len(table.block_ids), len(columns(table))) == (5, 4)


def test_a_window_that_does_not_fit_its_pages_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="window of 10 tokens"):
        make_manager(window(10, num_pages=3))
    assert make_manager(window(10, num_pages=4)).max_chunk == 4
    with pytest.raises(ConfigError, match="window of 10 tokens"):
        make_manager(window(10, num_pages=4), max_drafts=3)


# --- states


def test_a_row_writes_to_as_many_states_as_its_drafts_need() -> None:
    manager = make_manager(states(), max_drafts=2)
    table = manager.match(PROMPT, "running")
    assert table.at_entry() == ((), ())
    assert manager.extend(table, 3) == ((0,), (0, 1, 2))
    assert manager.extend(table, 4) == ()


def test_the_step_behind_a_checkpoint_reads_it_and_writes_elsewhere() -> None:
    manager = make_manager(states())
    table = manager.match(PROMPT, "running")
    ((*_,), (first,)) = step(manager, table, PROMPT, 20)
    assert manager.extend(table, 22) == ((5,), (1,))
    assert state(table).written == [1]
    assert first in state(table).held(), "the step that reads it is under way"
    manager.confirm(table, PROMPT, 22)
    assert first not in state(table).held()
    found = manager.match(PROMPT, "running")
    assert found.at_entry()[1] == (first,)
    assert len(found.block_ids) == 5


def test_a_prefix_is_found_at_checkpoints_only() -> None:
    manager = make_manager(states())
    manager.release(compute(manager, PROMPT, (8, 14, 18)))
    assert manager.pool.counts()["cached"] == 5
    assert manager.count_matching(PROMPT) == 8
    assert manager.count_matching(PROMPT[:9]) == 8
    assert manager.count_matching(PROMPT[:8]) == 0


def test_chunks_end_where_checkpoints_are_of_use() -> None:
    manager = make_manager(states())
    ends = [manager.chunk_end(start, end, 22) for start, end in ((0, 22), (0, 15), (4, 7), (16, 22), (20, 22))]
    assert ends == [20, 12, 7, 20, 22]
    assert manager.chunk_end(0, 20, 20) == 16
    assert make_manager(window(6)).chunk_end(0, 15, 22) == 15
    assert make_manager(states(), prefix_caching=False).chunk_end(0, 15, 22) == 15


def test_while_decoding_only_the_newest_checkpoint_is_kept() -> None:
    manager = make_manager(states())
    table = compute(manager, PROMPT, (20,))
    tokens = list(PROMPT)
    for _ in range(15):
        tokens.append(len(tokens))
        step(manager, table, tokens, len(tokens))
    manager.release(table)
    assert manager.count_matching((*tokens, 7)) == 36
    assert manager.count_matching(tokens[:36]) == 20, "those at 24, 28 and 32 are gone, the prompt's is not"
    assert manager.other_counts()["state"]["cached"] == 2


def test_with_drafts_there_are_no_checkpoints_behind_the_prompt() -> None:
    manager = make_manager(states(), max_drafts=1)
    table = compute(manager, PROMPT, (20,))
    for end in (23, 24, 25, 28):
        assert len(step(manager, table, range(100, 140), end)) in (0, 2)
        assert len(state(table).held()) == 2
    assert manager.other_counts()["state"]["cached"] == 1


def test_the_first_page_alone_changes_behind_a_checkpoint_of_a_row_with_drafts() -> None:
    manager = make_manager(states(), max_drafts=2)
    table = manager.match(PROMPT, "running")
    assert step(manager, table, PROMPT, 20)[1] == (0, 1, 2)
    assert step(manager, table, PROMPT, 22)[1] == (3, 1, 2)


def test_without_a_page_to_go_on_with_a_state_is_overwritten_instead_of_kept() -> None:
    manager = make_manager(states(num_pages=2))
    other = manager.match((1, 2), "running")
    manager.extend(other, 2)
    table = compute(manager, PROMPT, (20,))
    assert state(table).written == [1]
    assert manager.other_counts()["state"] == {"free": 0, "cached": 0, "running": 2, "leased": 0, "arriving": 0}
    assert manager.count_matching(PROMPT) == 0


def test_too_few_pages_of_states_are_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="states"):
        make_manager(states(num_pages=3), max_drafts=2)


# --- several groups, and handing over


def test_what_is_handed_over_is_what_the_tokens_behind_the_prompt_need() -> None:
    prefill = make_manager(window(6), states(), max_drafts=1)
    computed = compute(prefill, PROMPT, (20,))
    prefill.trim(computed)
    assert len(state(computed, 2).held()) == 1
    assert prefill.columns_behind(22) == {1: range(4, 6), 2: range(1)}

    decode = make_manager(window(6), states(), max_drafts=1)
    decode.release(compute(decode, PROMPT[:9]))
    table = decode.match(PROMPT, "arriving", in_first_group=True)
    assert len(table.block_ids) == 2
    assert decode.missing_to_receive(table, 22) == (4, 2, 1)
    assert decode.receive(table, 22)
    for group, needed in decode.columns_behind(22).items():
        sent, received = prefill.handed_over(computed, group, needed), decode.handed_over(table, group, needed)
        assert len(sent) == len(received) == len(needed)
        assert NO_PAGE not in received or group == 2
    decode.rename(table, "running")
    decode.confirm(table, PROMPT, 22)
    entry = table.at_entry()
    assert (len(entry[0]), len(entry[1])) == (6, 6)
    assert entry[2] == decode.handed_over(table, 2, range(1))
    new = decode.extend(table, 24)
    assert new is not None
    assert (new[0], new[1], len(new[2])) == ((), (), 2)
    assert not set(entry[2]) & set(new[2])
    decode.release(table)
    decode.check_integrity()


def test_receiving_takes_pages_of_all_groups_or_of_none() -> None:
    manager = make_manager(window(6), states(num_pages=2))
    other = manager.match((1,), "running")
    manager.extend(other, 1)
    first, second = (manager.match(PROMPT, "arriving", in_first_group=True) for _ in range(2))
    assert manager.receive(first, 22)
    assert not manager.receive(second, 22)
    assert manager.pool.counts()["arriving"] == 6
    assert manager.has_pages_elsewhere


@settings(max_examples=300, deadline=None)
@given(
    groups=st.lists(st.sampled_from((1, 3, 6, 9, None)), max_size=3, unique=True),
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=34), min_size=2, max_size=10),
    steps=st.lists(st.integers(1, 9), min_size=20, max_size=20),
    num_pages=st.integers(10, 30),
)
def test_what_is_found_is_the_longest_prefix_that_every_group_can_go_on_behind(
    groups: list[int | None], prompts: list[list[int]], steps: list[int], num_pages: int
) -> None:
    others = [states(num_pages) if size is None else window(size, num_pages) for size in groups]
    manager = make_manager(*others, num_blocks=num_pages)
    for prompt in prompts:
        table = manager.match(prompt, "running")
        assert len(table.block_ids) == _longest(manager, groups, prompt)
        end = len(table.block_ids) * SIZE
        for size in steps:
            end = min(len(prompt), end + size)
            step(manager, table, prompt, end)
        manager.release(table)
        manager.check_integrity()


def _longest(manager: BlockManager, groups: list[int | None], prompt: Sequence[int]) -> int:
    """The same by trying every prefix, from what each pool has."""
    prefixes = manager._find_prefixes(prompt)
    pools = [group.pool for group in manager._groups[1:]]

    def has(group: int, column: int) -> bool:
        prefix = prefixes[column]
        return pools[group].find(prefix.hash, prefix.tokens, prefix.parent) is not None

    for num_blocks in range(len(prefixes), 0, -1):
        end = num_blocks * SIZE
        needed = [
            {num_blocks - 1} if size is None else {at // SIZE for at in range(max(0, end - size + 1), end)}
            for size in groups
        ]
        if all(has(group, column) for group, columns in enumerate(needed) for column in columns):
            return num_blocks
    return 0


def test_a_window_longer_than_the_cache_limits_nothing_if_it_has_as_many_pages() -> None:
    assert make_manager(window(100, num_pages=8), num_blocks=8).max_chunk is None
    with pytest.raises(ConfigError, match="window of 100 tokens"):
        make_manager(window(100, num_pages=7), num_blocks=8)
