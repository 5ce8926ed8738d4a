"""Routes between engines that lay out the same KV differently, against pages that say of each byte what it is."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_cluster.errors import TransferError
from atom_cluster.kv_cache.page_map import PageMap, PagePart, RowSection
from atom_cluster.kv_transfer.pieces import Extent
from atom_cluster.kv_transfer.routes import (
    MAX_BLOCK_SIZE,
    MAX_RANKS,
    RoutePlanner,
    check_placement,
    plan_routes,
    units_of,
)
from atom_cluster.messages.transfer import KvPlacement

NUM_TOKENS = 128
Labels = npt.NDArray[np.int64]


def label_pages(page_map: PageMap, placement: KvPlacement, rank: int) -> Labels:
    """[pages, bytes] of a prompt of `NUM_TOKENS`: each byte's place in the KV of all ranks, -1 where there is none."""
    num_pages = 1 if page_map.is_state else NUM_TOKENS // placement.block_size
    size = page_map.page_bytes(rank, placement.world_size, placement.block_size)
    pages = np.full((num_pages, size), -1, dtype=np.int64)
    for page, (index, part) in itertools.product(range(num_pages), enumerate(page_map.parts)):
        at = page_map.offsets(rank, placement.world_size, placement.block_size)[index]
        for row in range(part.num_rows(placement.block_size)):
            entry = entry_of(part, placement.block_size, page, row)
            column = 0
            for section in part.sections:
                share = section.share(rank, placement.world_size)
                num_bytes = len(share) * section.unit_bytes
                start = (
                    (index << 40) + (0 if entry is None else entry << 20) + column + share.start * section.unit_bytes
                )
                if entry is not None:
                    pages[page, at : at + num_bytes] = np.arange(start, start + num_bytes)
                at += num_bytes
                column += section.num_units * section.unit_bytes
    return pages


def entry_of(part: PagePart, block_size: int, page: int, row: int) -> int | None:
    """Number of the entry that a row is for; None for one that its page does not use."""
    tokens = part.tokens_per_row
    if tokens is None:
        return 0
    if block_size >= tokens:
        return page * (block_size // tokens) + row
    end = (page + 1) * block_size
    return end // tokens - 1 if end % tokens == 0 else None


def read_all(page_map: PageMap, source: KvPlacement, reader: KvPlacement, rank: int) -> tuple[Labels, int]:
    """What a reading rank has after it read everything, and how many bytes these were."""
    origins = [label_pages(page_map, source, peer) for peer in range(source.world_size)]
    target = np.full_like(label_pages(page_map, reader, rank), -1)
    units = units_of(page_map, source=source, reader=reader)
    num_bytes = 0
    for route in plan_routes(page_map, source=source, reader=reader, rank=rank):
        assert len(route.pieces) == units.num_phases
        origin = origins[route.source]
        for unit in range(len(origin) * units.per_remote_block):
            remote, local = unit // units.per_remote_block, unit // units.per_local_block
            pieces = route.pieces[unit % units.num_phases]
            if pieces is None:
                target[local] = origin[remote]
                num_bytes += page_map.offsets(rank, reader.world_size, reader.block_size)[-1]
                continue
            for piece in pieces:
                taken = [b for run in runs(piece.remote) for b in run]
                put = [b for run in runs(piece.local) for b in run]
                target[local, put] = origin[remote, taken]
                num_bytes += len(taken)
    return target, num_bytes


def runs(extent: Extent) -> list[range]:
    starts = (extent.offset + i * extent.stride for i in range(extent.count))
    return [range(start, start + extent.num_bytes) for start in starts]


def heads(num_heads: int, head_bytes: int = 8, tokens_per_row: int = 1) -> PagePart:
    return PagePart((RowSection(num_heads, head_bytes, is_divided=True),), tokens_per_row)


def latent(num_bytes: int = 24, tokens_per_row: int = 1) -> PagePart:
    return PagePart((RowSection(1, num_bytes, is_divided=False),), tokens_per_row)


STATE = PageMap(
    (
        PagePart((RowSection(8, 12, is_divided=True),), None),
        PagePart((RowSection(8, 6, True), RowSection(8, 6, True), RowSection(16, 6, True)), None),
        PagePart((RowSection(1, 10, is_divided=False),), None),
    )
)
MAPS = {
    "heads": PageMap((heads(4), heads(4, 2), heads(2, 16))),
    "latents": PageMap((latent(), latent(10), latent(6), latent(2))),
    "both": PageMap((heads(8), latent(), heads(1))),
    "compressed": PageMap((latent(), latent(8, 4), latent(4, 16))),
    "state": STATE,
}
PLACEMENTS = [KvPlacement(size, ranks) for size in (2, 4, 16, 64) for ranks in (1, 2, 4, 8)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(MAPS)), st.sampled_from(PLACEMENTS), st.sampled_from(PLACEMENTS))
def test_every_rank_gets_each_byte_of_its_own_once(name: str, source: KvPlacement, reader: KvPlacement) -> None:
    page_map = MAPS[name]
    for rank in range(reader.world_size):
        wanted = label_pages(page_map, reader, rank)
        found, num_bytes = read_all(page_map, source, reader, rank)
        # A row that its page does not use may be filled with another such row, in pages of one size.
        assert np.array_equal(found[wanted >= 0], wanted[wanted >= 0])
        assert set(found[wanted < 0]) <= {-1}
        if name != "compressed":
            assert num_bytes == np.count_nonzero(wanted >= 0)


def test_equal_placements_read_whole_blocks_of_the_same_rank() -> None:
    (route,) = plan_routes(MAPS["both"], source=KvPlacement(16, 4), reader=KvPlacement(16, 4), rank=2)
    assert (route.source, route.pieces) == (2, (None,))


def test_latents_of_fewer_ranks_are_read_as_whole_blocks_too() -> None:
    for rank in range(4):
        (route,) = plan_routes(MAPS["latents"], source=KvPlacement(16, 2), reader=KvPlacement(16, 4), rank=rank)
        assert (route.source, route.pieces) == (rank // 2, (None,))


def test_what_several_ranks_have_is_read_from_all_of_them() -> None:
    routes = plan_routes(MAPS["latents"], source=KvPlacement(16, 4), reader=KvPlacement(16, 1), rank=0)
    assert [route.source for route in routes] == [0, 1, 2, 3]
    routes = plan_routes(MAPS["latents"], source=KvPlacement(16, 4), reader=KvPlacement(16, 2), rank=1)
    assert [route.source for route in routes] == [2, 3]
    # One head on two ranks each; the reader has the second one of two.
    routes = plan_routes(PageMap((heads(2), heads(2))), source=KvPlacement(16, 4), reader=KvPlacement(16, 2), rank=1)
    assert [route.source for route in routes] == [2, 3]


def test_layers_that_lie_together_on_both_sides_are_one_piece() -> None:
    whole = PageMap((latent(24), latent(10), heads(4, 8)))
    (route,) = plan_routes(whole, source=KvPlacement(16, 1), reader=KvPlacement(16, 2), rank=1)
    assert route.pieces[0] is not None
    assert [piece.remote for piece in route.pieces[0]] == [Extent(0, 16 * 34), Extent(16 * 34 + 16, 16, 16, 32)]
    assert [piece.local for piece in route.pieces[0]] == [Extent(0, 16 * 34), Extent(16 * 34, 16, 16, 16)]


def test_a_planner_remembers_a_bounded_number_of_routes() -> None:
    planner = RoutePlanner((MAPS["heads"],))
    for block_size in range(1, 400):
        planner.routes(0, source=KvPlacement(block_size, 1), reader=KvPlacement(block_size, 2), rank=0)
    assert len(planner._known) <= 256
    again = planner.routes(0, source=KvPlacement(16, 1), reader=KvPlacement(16, 2), rank=0)
    assert again is planner.routes(0, source=KvPlacement(16, 1), reader=KvPlacement(16, 2), rank=0)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (KvPlacement(0, 1), "no engine has blocks of 0 tokens"),
        (KvPlacement(16, 0), "on 0 ranks"),
        (KvPlacement(16, MAX_RANKS + 1), "no engine"),
        (KvPlacement(MAX_BLOCK_SIZE * 2, 1), "no engine"),
        (KvPlacement(24, 1), "cache.block_size is 16 here and 24 there: one must be a multiple of the other"),
    ],
)
def test_placements_that_cannot_be_exchanged_with_are_refused(placement: KvPlacement, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        check_placement(placement, KvPlacement(16, 2))
