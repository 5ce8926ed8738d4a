"""How rows are grouped: bounded padding, bounded memory, and nothing gathered that no query sees."""

import pytest
import torch

from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.cpu.attention import MAX_GROUP_TOKENS, RowGroup, row_groups

BLOCK_SIZE = 16


def groups_of(lengths: list[int], num_queries: list[int] | None = None, window: int | None = None) -> list[RowGroup]:
    counts = num_queries or [1] * len(lengths)
    starts = [sum(counts[:row]) for row in range(len(counts) + 1)]
    metadata = AttentionMetadata(
        block_size=BLOCK_SIZE,
        window=window,
        num_decode_rows=counts.count(1),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor(lengths, dtype=torch.int32),
        block_table=torch.zeros(len(lengths), -(-max(lengths) // BLOCK_SIZE), dtype=torch.int32),
        slot=torch.zeros(starts[-1], dtype=torch.int64),
        query_start_cpu=tuple(starts),
        context_len_cpu=tuple(lengths),
    )
    return row_groups(metadata, torch.float32)


@pytest.mark.parametrize("num_queries", [1, 4])
def test_rows_of_similar_length_are_one_group_in_order(num_queries: int) -> None:
    groups = groups_of([100, 60, 110, 80], [num_queries] * 4)
    assert [group.tokens for group in groups] == [None]


@pytest.mark.parametrize(
    "lengths", [[1, 5000, 30, 31, 16, 2000, 900], [200] * 100, [MAX_GROUP_TOKENS * 2, MAX_GROUP_TOKENS * 2, 16]]
)
def test_every_row_is_in_one_group_that_is_neither_mostly_padding_nor_large(lengths: list[int]) -> None:
    groups = groups_of(lengths)
    members = [group.tokens.tolist() for group in groups if group.tokens is not None]
    assert sorted(row for group in members for row in group) == list(range(len(lengths)))
    for group, rows in zip(groups, members):
        assert len(rows) == 1 or group.blocks.numel() * BLOCK_SIZE <= MAX_GROUP_TOKENS
        used = sum(-(-lengths[row] // BLOCK_SIZE) for row in rows)
        assert group.blocks.numel() <= 2 * used


def test_rows_with_different_numbers_of_queries_are_apart() -> None:
    groups = groups_of([40, 41, 42, 43], [1, 1, 3, 3])
    assert [group.tokens.tolist() for group in groups if group.tokens is not None] == [[0, 1], [2, 3, 4, 5, 6, 7]]


def test_behind_a_window_nothing_is_gathered() -> None:
    (group,) = groups_of([5000, 700, 30], window=BLOCK_SIZE + 1)
    assert group.tokens is None
    assert group.blocks.numel() <= 3 * 3
