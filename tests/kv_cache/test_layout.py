"""Layouts of caches that keep one entry for several tokens."""

from __future__ import annotations

import pytest

from atom_cluster.errors import ConfigError
from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout

PER_TOKEN = KvLayerLayout(num_kv_heads=2, key_dim=3, value_dim=1, dtype="float32")
PER_FOUR = KvLayerLayout(num_kv_heads=1, key_dim=8, value_dim=0, dtype="bfloat16", tokens_per_entry=4)
PER_SIXTEEN = KvLayerLayout(num_kv_heads=1, key_dim=8, value_dim=0, dtype="bfloat16", tokens_per_entry=16)


@pytest.mark.parametrize(("block_size", "num_entries"), [(1, 1), (2, 1), (4, 1), (8, 2), (64, 16)])
def test_a_page_has_room_for_the_entries_that_its_tokens_complete(block_size: int, num_entries: int) -> None:
    assert PER_FOUR.entries_per_page(block_size) == num_entries


def test_pages_hold_tokens_and_entries_of_all_their_layers() -> None:
    layout = KvLayout(layers=(PER_TOKEN, PER_FOUR, PER_SIXTEEN))
    (group,) = layout.groups
    assert layout.page_bytes(group, 8) == 8 * 2 * 4 * 4 + 2 * 8 * 2 + 1 * 8 * 2


def test_layouts_with_other_entries_are_told_apart() -> None:
    assert len({layout.describe() for layout in (PER_TOKEN, PER_FOUR, PER_SIXTEEN)}) == 3


@pytest.mark.parametrize("block_size", [3, 6, 24, 40])
def test_pages_that_would_cut_entries_in_two_are_refused(block_size: int) -> None:
    with pytest.raises(ConfigError, match=f"cache.block_size = {block_size} .* 16 tokens"):
        PER_SIXTEEN.entries_per_page(block_size)
