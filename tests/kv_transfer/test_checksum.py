from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.checksum import BlockTagger, odd_weights
from atom_cluster.kv_transfer.pieces import Extent
from atom_cluster.kv_transfer.protocol import KvRegion

NUM_BLOCKS = 6
SHAPES = ((2, 4), (3, 8))
"""float32 dims of one block per cache group: 4 and 12 words."""


def make_regions(seed: int = 0) -> tuple[KvRegion, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        KvRegion(f"region {index}", torch.randn(NUM_BLOCKS, *shape, generator=generator))
        for index, shape in enumerate(SHAPES)
    )


@pytest.mark.parametrize("group", [0, 1])
def test_a_tag_is_the_weighted_sum_of_words_modulo_two_to_the_64_mixed_one_to_one(group: int) -> None:
    regions = make_regions()
    blocks = regions[group].blocks.view(NUM_BLOCKS, -1).view(torch.int64).tolist()
    weights = odd_weights(len(blocks[0])).tolist()
    sums = [sum(word * weight for word, weight in zip(words, weights, strict=True)) for words in blocks]
    shifted = 12345 * 0x9E3779B97F4A7C15
    from_sums = []
    for value in sums:
        mixed = (value + shifted) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        from_sums.append(mixed ^ (mixed >> 31))
    assert list(BlockTagger(regions).tags(group, range(NUM_BLOCKS), epoch=12345)) == from_sums


def test_weights_are_odd_distinct_and_never_change() -> None:
    weights = odd_weights(10_000)
    assert bool((weights % 2 != 0).all())
    assert len(set(weights.tolist())) == 10_000
    assert torch.equal(odd_weights(100), weights[:100])
    # Peers of different versions must agree on these.
    assert weights[:2].tolist() == [1129734510100923727, 4100529673128033305]


@settings(max_examples=60, deadline=None)
@given(
    group=st.integers(0, 1),
    block=st.integers(0, NUM_BLOCKS - 1),
    word=st.integers(0, 3),
    change=st.integers(1, 2**63 - 1),
)
def test_a_change_of_any_word_changes_the_tag_of_its_block_only(group: int, block: int, word: int, change: int) -> None:
    regions = make_regions()
    tagger = BlockTagger(regions)
    before = [tagger.tags(g, range(NUM_BLOCKS), epoch=1) for g in (0, 1)]
    regions[group].blocks[block].view(-1).view(torch.int64)[word] ^= change
    after = [tagger.tags(g, range(NUM_BLOCKS), epoch=1) for g in (0, 1)]
    assert [(g, i) for g in (0, 1) for i in range(NUM_BLOCKS) if before[g][i] != after[g][i]] == [(group, block)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=12))
def test_the_tag_of_a_block_does_not_depend_on_its_company(block_ids: list[int]) -> None:
    tagger = BlockTagger(make_regions())
    everything = tagger.tags(1, range(NUM_BLOCKS), epoch=9)
    assert tagger.tags(1, block_ids, epoch=9) == tuple(everything[block] for block in block_ids)


def test_swapped_words_and_another_epoch_change_the_tag() -> None:
    regions = make_regions()
    tagger = BlockTagger(regions)
    (before,) = tagger.tags(0, [2], epoch=1)
    assert tagger.tags(0, [2], epoch=2) != (before,)
    words = regions[0].blocks[2].view(-1).view(torch.int64)
    words[[0, 1]] = words[[1, 0]].clone()
    assert tagger.tags(0, [2], epoch=1) != (before,)


def test_tags_do_not_depend_on_how_blocks_lie_in_memory() -> None:
    regions = make_regions()
    joint = torch.cat([region.blocks.reshape(NUM_BLOCKS, -1) for region in regions], dim=1)
    strided = (KvRegion("a", joint[:, :8]), KvRegion("b", joint[:, 8:]))
    for group in (0, 1):
        assert BlockTagger(strided).tags(group, [5, 0], epoch=3) == BlockTagger(regions).tags(group, [5, 0], epoch=3)


PARTS = (
    ((Extent(8, 16),), (Extent(32, 16),)),
    ((Extent(0, 8, 3, 16), Extent(88, 8)), (Extent(16, 24), Extent(64, 8))),
    ((Extent(2, 6, 4, 20),), (Extent(1, 6, 4, 7),)),
    ((Extent(0, 3),), (Extent(93, 3),)),
)
"""Extents of blocks of 96 bytes, and others with as many bytes in as many runs, more or less."""


@pytest.mark.parametrize(("there", "here"), PARTS)
def test_what_was_read_of_a_block_has_the_tag_of_where_it_came_from(
    there: tuple[Extent, ...], here: tuple[Extent, ...]
) -> None:
    source, target = make_regions(1), make_regions(2)
    rows = [region[1].blocks.view(NUM_BLOCKS, -1).view(torch.uint8) for region in (source, target)]
    at = [
        [e.offset + i * e.stride + b for e in es for i in range(e.count) for b in range(e.num_bytes)]
        for es in (there, here)
    ]
    rows[1][5, at[1]] = rows[0][2, at[0]]
    expected = BlockTagger(source).tags(1, [2], 9, there)
    assert BlockTagger(target).tags(1, [5], 9, here) == expected
    assert BlockTagger(target).tags(1, [4], 9, here) != expected
    rows[1][5, at[1][-1]] ^= 1
    assert BlockTagger(target).tags(1, [5], 9, here) != expected
    before = BlockTagger(source).tags(1, [2], 9, there)
    outside = next(byte for byte in range(96) if byte not in at[0])
    rows[0][2, outside] ^= 1
    assert BlockTagger(source).tags(1, [2], 9, there) == before, "what is not read does not count"


@pytest.mark.parametrize("extents", [extents for pair in PARTS for extents in pair])
def test_devices_which_gather_in_another_way_find_the_same_tags(extents: tuple[Extent, ...]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    regions = make_regions()
    host = BlockTagger(regions)
    like_a_device = BlockTagger([KvRegion(region.name, region.blocks.to(device)) for region in regions])
    like_a_device._is_host = False  # a CPU interprets the kernels
    assert like_a_device.tags(1, [3, 1, 5], 9, extents) == host.tags(1, [3, 1, 5], 9, extents)


def test_one_extent_of_all_has_the_tag_of_the_whole_block_and_none_the_tag_of_nothing() -> None:
    tagger = BlockTagger(make_regions())
    assert tagger.tags(1, [3, 4], 9, [Extent(0, 96)]) == tagger.tags(1, [3, 4], 9)
    assert len(set(tagger.tags(1, [3, 4], 9, ()))) == 1


def test_extents_outside_of_a_block_are_refused() -> None:
    with pytest.raises(TransferError, match="not within a block of 96"):
        BlockTagger(make_regions()).tags(1, [0], 9, [Extent(90, 8)])


def test_weights_are_not_made_before_they_are_needed() -> None:
    tagger = BlockTagger(make_regions())
    assert tagger._all_weights is None
    tagger.tags(0, [1], 9)
    assert tagger._all_weights is not None


def test_blocks_that_are_not_whole_words_are_refused() -> None:
    with pytest.raises(TransferError, match="64-bit"):
        BlockTagger((KvRegion("odd", torch.zeros(4, 6, dtype=torch.bfloat16)),))


@pytest.mark.parametrize(("group", "block", "message"), [(1, NUM_BLOCKS, "outside"), (2, 0, "no group 2")])
def test_what_is_not_there_is_refused(group: int, block: int, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        BlockTagger(make_regions()).tags(group, [block], epoch=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_tags_are_the_same_on_a_device() -> None:
    regions = make_regions()
    on_device = tuple(KvRegion(region.name, region.blocks.cuda()) for region in regions)
    block_ids = [3, 1, 2, 5]
    for group in (0, 1):
        for extents in (None, (Extent(2, 6, 3, 9), Extent(24, 8)), (Extent(8, 8, 2, 8),)):
            found, expected = (
                BlockTagger(memory).tags(group, block_ids, 77, extents) for memory in (on_device, regions)
            )
            assert found == expected
