"""Page maps: sizes of pages on every rank, from the layout of any of them."""

from __future__ import annotations

import dataclasses

import pytest

from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout, StateLayerLayout, StateTensor
from atom_cluster.kv_cache.page_map import RowSection, check_page_bytes, page_maps
from atom_cluster.parallel.groups import Group
from atom_cluster.parallel.sharding import kv_head_span


def layout_of(world_size: int) -> KvLayout:
    """What one of so many ranks of a hybrid model keeps."""
    num_heads = max(1, 4 // world_size)
    return KvLayout(
        layers=(
            KvLayerLayout(num_kv_heads=num_heads, all_kv_heads=4, key_dim=8, value_dim=4, dtype="bfloat16"),
            KvLayerLayout(num_kv_heads=1, key_dim=5, value_dim=0, dtype="float8_e4m3fn"),
            KvLayerLayout(num_kv_heads=1, key_dim=6, value_dim=0, dtype="float32", tokens_per_entry=4),
            KvLayerLayout(num_kv_heads=num_heads, all_kv_heads=4, key_dim=8, value_dim=8, dtype="float32", window=9),
            StateLayerLayout(
                tensors=(
                    StateTensor(name="recurrent", shape=(16 // world_size, 3), dtype="float32", sections=(16,)),
                    StateTensor(name="conv", shape=(64 // world_size, 3), dtype="bfloat16", sections=(16, 16, 32)),
                    StateTensor(name="same", shape=(5,), dtype="bfloat16"),
                )
            ),
        )
    )


@pytest.mark.parametrize("block_size", [2, 4, 16])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_pages_of_every_rank_are_as_large_as_its_own_layout_says(world_size: int, block_size: int) -> None:
    layout = layout_of(world_size)
    maps = page_maps(layout_of(1))
    assert maps == page_maps(layout)
    assert [page_map.is_state for page_map in maps] == [False, False, True]
    for rank in range(world_size):
        check_page_bytes(maps, layout, rank=rank, world_size=world_size, block_size=block_size)


def test_a_layer_that_divides_its_heads_in_another_way_is_found() -> None:
    layout = layout_of(2)
    other = dataclasses.replace(layout.layers[0], num_kv_heads=3)
    with pytest.raises(AssertionError, match="full pages have"):
        maps = page_maps(layout)
        wrong = KvLayout(layers=(other, *layout.layers[1:]))
        check_page_bytes(maps, wrong, rank=0, world_size=2, block_size=16)


@pytest.mark.parametrize(("num_heads", "size"), [(8, 1), (8, 2), (8, 8), (2, 8), (1, 4), (3, 3), (4, 4)])
def test_heads_are_divided_as_the_layers_do_it(num_heads: int, size: int) -> None:
    section = RowSection(num_heads, 2, is_divided=True)
    for rank in range(size):
        span = kv_head_span(num_heads, 16, Group(rank=rank, size=size, handle=None))
        share = section.share(rank, size)
        assert (share.start * 16, len(share) * 16) == (span.start, span.length)


def test_the_layouts_of_all_numbers_of_ranks_have_one_description() -> None:
    assert len({layout_of(world_size).describe() for world_size in (1, 2, 4)}) == 1
    changed = dataclasses.replace(layout_of(1).layers[0], all_kv_heads=8)
    assert KvLayout(layers=(changed, *layout_of(1).layers[1:])).describe() != layout_of(1).describe()
