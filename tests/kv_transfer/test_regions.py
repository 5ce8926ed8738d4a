from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.regions import adjacent_runs, byte_rows, host_views


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30), st.integers(1, 8))
def test_runs_cover_every_position_once_in_order_and_count_up_in_all_lists(
    pairs: list[tuple[int, int]], max_blocks: int
) -> None:
    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    positions: list[int] = []
    for start, length in adjacent_runs(left, right, max_blocks=max_blocks):
        assert 1 <= length <= max_blocks
        for blocks in (left, right):
            assert blocks[start : start + length] == list(range(blocks[start], blocks[start] + length))
        positions.extend(range(start, start + length))
    assert positions == list(range(len(pairs)))


def test_adjacent_blocks_are_one_run() -> None:
    assert list(adjacent_runs([4, 5, 6, 9], [0, 1, 2, 3], max_blocks=8)) == [(0, 3), (3, 1)]


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("max_bytes", [7, 24, 100])
def test_views_hold_the_bytes_of_the_blocks_and_write_through(*, is_dense: bool, max_bytes: int) -> None:
    memory = torch.arange(60, dtype=torch.float32).view(10, 6)
    blocks = memory if is_dense else memory[:, :3]
    rows = byte_rows(KvRegion("r", blocks)).numpy()
    order = [3, 4, 5, 0, 9]
    views = list(host_views(rows, order, max_bytes=max_bytes))
    assert max(len(view) for view in views) <= max_bytes
    assert b"".join(views) == blocks[order].numpy().tobytes()
    for view in views:
        view[:] = bytes(len(view))
    assert not blocks[order].any()
    assert blocks[[1, 2, 6, 7, 8]].all()


@pytest.mark.parametrize(
    "blocks",
    [torch.zeros(4), torch.zeros(0, 4), torch.zeros(4, 6)[:, ::2], torch.zeros(1, 4).expand(3, 4)],
    ids=["no dims", "no blocks", "gaps within blocks", "overlapping blocks"],
)
def test_regions_that_are_not_blocks_of_bytes_are_refused(blocks: torch.Tensor) -> None:
    with pytest.raises(TransferError):
        byte_rows(KvRegion("r", blocks))
