"""Whole prompts that a library attends to: copied out of their pages and padded, nothing of others is seen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from atom_cluster.ops import torch_ref
from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.triton import attention_library

DIM, SIZE = 16, 4


@pytest.mark.parametrize("lengths", [(33,), (17, 40), (64, 5)])
def test_prompts_in_pages(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        assert query.shape[2] == key.shape[2] == attention_library.padded_length(query.shape[2])
        assert value.isfinite().all() and key.isfinite().all()
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    monkeypatch.setattr(attention_library, "causal_attention", stand_in)
    monkeypatch.setattr(attention_library, "MIN_TOKENS", 10)
    torch.manual_seed(0)
    counts = [-(-length // SIZE) for length in lengths]
    ids = torch.randperm(sum(counts)).split(counts)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    key, value = torch.full((2, sum(counts), 3, SIZE, 2, DIM), float("nan"))[:, :, 1]
    for row, length in enumerate(lengths):
        table[row, : counts[row]] = ids[row]
        position = torch.arange(length)
        at = ids[row][position // SIZE], position % SIZE
        key[at], value[at] = torch.randn(2, length, 2, DIM)
    starts = tuple(sum(lengths[:row]) for row in range(len(lengths) + 1))
    metadata = AttentionMetadata(
        block_size=SIZE,
        num_decode_rows=0,
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        slot=torch.zeros(starts[-1], dtype=torch.int64),
        query_start_cpu=starts,
        context_len_cpu=lengths,
    )
    kv, query = KvLayerCache(key, value), torch.randn(starts[-1], 6, DIM)
    expected = torch_ref.plan_attention(metadata).attend(query, kv, scale=0.3)
    rows = attention_library.long_whole_prompts(metadata, 0)
    assert rows == tuple(row for row, length in enumerate(lengths) if length >= 10)
    for row in rows:
        found = torch.empty_like(query)
        attention_library.attend_prompt(row, query, kv, metadata, found, scale=0.3)
        tokens = slice(starts[row], starts[row + 1])
        torch.testing.assert_close(found[tokens], expected[tokens])


def test_lengths_are_rounded_up_by_a_sixteenth_at_most() -> None:
    padded = {attention_library.padded_length(length): length for length in range(4096, 131073)}
    assert len(padded) == 5 * attention_library.LENGTHS_PER_OCTAVE + 1
    assert all(length <= up <= length * 17 / 16 for up, length in padded.items())
    assert all(attention_library.padded_length(up) == up for up in padded)
