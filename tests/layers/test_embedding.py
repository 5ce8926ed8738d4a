"""A vocabulary that does not divide among ranks is split all the same."""

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.embedding import Embedding
from atom_cluster.layers.logits import LogitsHead
from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.groups import Group, ProcessGroups

VOCAB_SIZE, HIDDEN_SIZE = 7, 3


def make_embedding(rank: int, num_ranks: int) -> tuple[LayerContext, Embedding]:
    context = LayerContext(
        ops=torch_table("test"),
        groups=ProcessGroups(Group(rank=rank, size=num_ranks, handle=None)),
        dtype=torch.float32,
        device=torch.device("cpu"),
        weight_dtype=torch.bfloat16,
        name="embed",
    )
    embedding = Embedding(context, vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE)
    full = torch.arange(VOCAB_SIZE * HIDDEN_SIZE, dtype=torch.float32).view(VOCAB_SIZE, HIDDEN_SIZE)
    part = embedding.weight_parts()["embed.weight"]
    assert part.full_shape == (VOCAB_SIZE, HIDDEN_SIZE)
    part.target.copy_(full[part.cut])
    return context, embedding


def test_each_token_is_looked_up_on_exactly_one_rank() -> None:
    tokens = torch.tensor([6, 0, 3, 4])
    whole = make_embedding(0, 1)[1](tokens)
    assert whole.dtype == torch.float32 and whole[0].tolist() == [18, 19, 20]
    for num_ranks in (2, 3, 5):
        parts = [make_embedding(rank, num_ranks)[1](tokens) for rank in range(num_ranks)]
        assert torch.equal(sum(parts), whole)


def test_a_tied_head_scores_the_embedding_rows_in_float32() -> None:
    context, embedding = make_embedding(0, 1)
    head = LogitsHead(context, embedding.shard, is_tied=True)
    head.finish_loading()
    logits = head(torch.eye(HIDDEN_SIZE)[:2]).gather()
    assert logits.dtype == torch.float32
    assert logits[1].tolist() == [1 + 3 * token for token in range(VOCAB_SIZE)]
