"""What is read off a slice of logits: probabilities, ranks and alternatives of the vocabulary, and of nothing else."""

from __future__ import annotations

import pytest
import torch

from atom_cluster.layers.logits import Logits
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.runner.prompt_scores import score_slice

VOCAB = 40


@pytest.mark.parametrize("num_top", [0, 3, VOCAB + 5])
def test_columns_that_stand_for_no_token_have_no_part_in_it(num_top: int) -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(logits, (0, 8), value=1e9)
    targets = torch.tensor([0, 5, VOCAB - 1, 7, 7, 30])
    expected = torch.log_softmax(logits, dim=-1)
    found = score_slice(Logits(padded, VOCAB, ProcessGroups.single().tensor), targets, num_top)
    rows = torch.arange(6)
    torch.testing.assert_close(found.logprob_S, expected[rows, targets])
    above = (expected > expected[rows, targets].unsqueeze(1)).sum(dim=1)
    assert found.rank_S.tolist() == (above + 1).tolist()
    best = expected.topk(min(num_top, VOCAB), dim=-1)
    assert found.top_ids_SK.tolist() == best.indices.tolist()
    torch.testing.assert_close(found.top_SK, best.values)


def test_tokens_that_are_as_likely_share_a_rank() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]]).repeat(5, 1)
    found = score_slice(Logits(logits, 5, ProcessGroups.single().tensor), torch.arange(5), 5)
    assert found.rank_S.tolist() == [1, 2, 2, 2, 5]
    assert found.top_ids_SK[:, 0].tolist() == [0] * 5 and found.top_ids_SK[:, 4].tolist() == [4] * 5
