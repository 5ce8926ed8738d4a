from __future__ import annotations

from dataclasses import replace

import pytest

from atom_cluster.errors import ConfigError
from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout, PageGroup, StateLayerLayout, StateTensor
from atom_cluster.runner.kv_sizing import KvSizing, describe_pages, other_groups

FULL = KvLayerLayout(num_kv_heads=2, key_dim=8, value_dim=8, dtype="float32")
"""2 KiB per block of 16."""
WINDOW = replace(FULL, window=33)
STATE = StateLayerLayout(tensors=(StateTensor(name="s", shape=(256,), dtype="float32"),))
"""1 KiB."""


def sizing(*layers: KvLayerLayout | StateLayerLayout, **changes: int) -> KvSizing:
    values = {"block_size": 16, "max_num_requests": 8, "max_num_batched_tokens": 64, "num_drafts": 0, **changes}
    return KvSizing(layout=KvLayout(layers=layers), **values)


def test_one_group_gets_all_that_fits() -> None:
    assert sizing(FULL).fit(11 * 2048 - 1) == 9  # and a spare one
    assert sizing(FULL).pages(9) == (9,)


def test_a_window_gets_what_all_rows_see_and_compute_and_an_eighth_of_the_blocks() -> None:
    # Per row: 32 positions before its token lie in at most 3 blocks, and its token may begin another.
    assert sizing(FULL, WINDOW).pages(1000) == (1000, 8 * (2 + 2) + 4 + 125)
    assert sizing(FULL, WINDOW, num_drafts=3).pages(1000) == (1000, 8 * (3 + 2) + 4 + 125)


def test_a_window_never_gets_more_than_the_blocks() -> None:
    assert sizing(FULL, WINDOW).pages(12) == (12, 12)


def test_states_are_enough_for_rows_to_read_one_and_write_the_others_and_to_keep_some() -> None:
    assert sizing(FULL, STATE).pages(20) == (20, 8 * 2 + 16)
    assert sizing(FULL, STATE, num_drafts=3).pages(20) == (20, 8 * 5 + 16)
    # An eighth of the blocks' bytes: 1000 blocks are 2000 KiB.
    assert sizing(FULL, STATE).pages(1000) == (1000, 8 * 2 + 250)


def test_there_are_no_more_rows_than_blocks() -> None:
    assert sizing(FULL, STATE, max_num_requests=256).pages(4) == (4, 4 * 2 + 16)


@pytest.mark.parametrize("budget_kib", [150, 151, 777, 10_000])
def test_the_most_blocks_are_found_whose_groups_fit_the_budget_together(budget_kib: int) -> None:
    made = sizing(FULL, WINDOW, STATE)
    found = made.fit(budget_kib * 1024)
    assert made.num_bytes(found) <= budget_kib * 1024 < made.num_bytes(found + 1)
    full, window, states = made.pages(found)
    assert made.num_bytes(found) == (full + window + 2) * 2048 + (states + 1) * 1024


def test_a_budget_for_less_than_two_blocks_is_an_error_that_names_the_keys() -> None:
    with pytest.raises(ConfigError, match="cpu_cache_gib"):
        sizing(FULL).fit(3 * 2048 - 1)


def test_states_that_would_leave_little_for_blocks_are_an_error_with_the_number_of_requests_that_fits() -> None:
    budget_bytes = 300 * 1024
    made = sizing(FULL, STATE, max_num_requests=100)
    with pytest.raises(ConfigError, match="scheduler.max_num_requests to 67, or raise cache.cpu_cache_gib"):
        made.fit(budget_bytes)
    fitting = replace(made, max_num_requests=67)
    assert fitting.num_bytes(fitting.fit(budget_bytes)) <= budget_bytes
    with pytest.raises(ConfigError, match=r"KV cache: raise cache\.cpu_cache_gib"):
        made.fit(30 * 1024)


def test_groups_behind_the_first_are_told_with_their_pages() -> None:
    layout = KvLayout(layers=(STATE, WINDOW, FULL))
    assert other_groups(layout, (9, 5, 4)) == (
        PageGroup(kind="window", window=33, num_pages=5),
        PageGroup(kind="state", window=None, num_pages=4),
    )
    assert describe_pages(layout, (9, 5, 4)) == "9, window 33: 5, state: 4"
