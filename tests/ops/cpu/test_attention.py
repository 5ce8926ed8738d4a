"""How decode rows are grouped: bounded padding, bounded memory."""

import pytest
import torch

from atom_cluster.ops.attention import AttentionMetadata
from atom_cluster.ops.cpu.attention import MAX_GROUP_TOKENS, decode_groups

BLOCK_SIZE = 16


def decode_rows(lengths: list[int]) -> AttentionMetadata:
    num_blocks = -(-max(lengths) // BLOCK_SIZE)
    return AttentionMetadata(
        block_size=BLOCK_SIZE,
        num_decode_rows=len(lengths),
        query_start=torch.arange(len(lengths) + 1, dtype=torch.int32),
        context_len=torch.tensor(lengths, dtype=torch.int32),
        block_table=torch.zeros(len(lengths), num_blocks, dtype=torch.int32),
        slot=torch.zeros(len(lengths), dtype=torch.int64),
        query_start_cpu=tuple(range(len(lengths) + 1)),
        context_len_cpu=tuple(lengths),
    )


def test_rows_of_similar_length_are_one_group_in_order() -> None:
    groups = decode_groups(decode_rows([100, 60, 110, 80]), torch.float32)
    assert [group.rows for group in groups] == [None]


@pytest.mark.parametrize(
    "lengths", [[1, 5000, 30, 31, 16, 2000, 900], [200] * 100, [MAX_GROUP_TOKENS * 2, MAX_GROUP_TOKENS * 2, 16]]
)
def test_every_row_is_in_one_group_that_is_neither_mostly_padding_nor_large(lengths: list[int]) -> None:
    groups = decode_groups(decode_rows(lengths), torch.float32)
    members = [group.rows.tolist() for group in groups if group.rows is not None]
    assert sorted(row for group in members for row in group) == list(range(len(lengths)))
    for group, rows in zip(groups, members):
        assert len(rows) == 1 or group.blocks.numel() * BLOCK_SIZE <= MAX_GROUP_TOKENS
        used = sum(-(-lengths[row] // BLOCK_SIZE) for row in rows)
        assert group.blocks.numel() <= 2 * used
