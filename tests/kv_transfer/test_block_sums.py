"""The kernel behind tags, interpreted on CPU memory where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.kv_transfer.block_sums import block_sums

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def words_like(*shape: int, seed: int) -> torch.Tensor:
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_words", "stride"), [(8, 8), (1024, 1024), (3000, 3000), (3000, 4096), (25, 33), (1, 1)])
@pytest.mark.parametrize("num_ids", [1, 5])
def test_each_block_is_summed_by_itself(num_words: int, stride: int, num_ids: int) -> None:
    words, weights = words_like(12, stride, seed=1)[:, :num_words], words_like(4096, seed=2)
    ids = torch.tensor([7, 0, 11, 7, 3][:num_ids])
    found = block_sums(words.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE))
    assert torch.equal(found.cpu(), (words[ids] * weights[:num_words]).sum(dim=1)), "exact modulo 2^64"


@pytest.mark.parametrize("num_places", [2, 7, 1500])
def test_words_are_taken_from_where_they_are_said_to_be(num_places: int) -> None:
    words, weights = words_like(6, 2000, seed=3), words_like(2000, seed=4)
    places = torch.randperm(2000, generator=torch.Generator().manual_seed(5))[:num_places]
    ids = torch.tensor([5, 2])
    found = block_sums(words.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), places.to(DEVICE))
    assert torch.equal(found.cpu(), (words[ids][:, places] * weights[:num_places]).sum(dim=1))
