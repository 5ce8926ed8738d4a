"""A CausalLM without weights whose next token is a known function of all tokens before it, read through the KV cache.

So any mistake in tokens, positions, slots, block tables, row starts or sample indices shows as a wrong token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atom_cluster.kv_cache.layout import KvLayerLayout, KvLayout
from atom_cluster.kv_transfer.agent import KvAgent
from atom_cluster.layers.forward_batch import ForwardBatch
from atom_cluster.messages.requests import SamplingParams
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.runner.kv_memory import KvMemory, allocate_kv_memory
from atom_cluster.runner.model_runner import ModelRunner
from atom_cluster.runner.rank_info import RankInfo

VOCAB = 97
BLOCK = 4
GREEDY = SamplingParams(temperature=0.0, seed=0)


def next_token(tokens: Sequence[int]) -> int:
    """The token that `ContextModel` finds most likely after these."""
    return sum((position + 1) * token for position, token in enumerate(tokens)) % VOCAB


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy output for a prompt."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class ContextModel:
    """See the module's docstring. `fail_on` makes the step raise that has this token among its input."""

    kv_layout = KvLayout(layers=(KvLayerLayout(num_kv_heads=1, key_dim=1, value_dim=1, dtype="float32"),) * 2)
    num_draft_layers = 0
    vocab_size = VOCAB

    def __init__(self, *, fail_on: int | None = None) -> None:
        self._fail_on = fail_on

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        metadata = batch.attention[None]
        if self._fail_on in batch.token_ids.tolist():
            raise RuntimeError("the device caught fire")
        query_start = metadata.query_start.tolist()
        assert tuple(query_start) == metadata.query_start_cpu
        assert tuple(metadata.context_len.tolist()) == metadata.context_len_cpu
        assert all(n == 1 for n in torch.tensor(query_start).diff()[: metadata.num_decode_rows])
        for layer in batch.caches:
            layer.key[metadata.slot // BLOCK, metadata.slot % BLOCK, 0, 0] = batch.token_ids.float()
            layer.value[metadata.slot // BLOCK, metadata.slot % BLOCK, 0, 0] = batch.positions.float() + 1
        return torch.stack([self._score(batch, t, query_start) for t in range(len(batch.token_ids))])

    def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor | None:  # noqa: N803 - the protocol's name
        best = hidden_SD[:, 0].long() % VOCAB
        return torch.nn.functional.one_hot(best, VOCAB).float() * 5

    def _score(self, batch: ForwardBatch, t: int, query_start: list[int]) -> torch.Tensor:
        row = next(r for r in range(len(query_start) - 1) if query_start[r + 1] > t)
        num_visible = int(batch.positions[t]) + 1
        blocks = batch.attention[None].block_table[row, : -(-num_visible // BLOCK)].long()
        last = batch.caches[-1]
        keys = last.key[blocks].reshape(-1)[:num_visible]
        values = last.value[blocks].reshape(-1)[:num_visible]
        return (keys * values).sum().reshape(1)


def make_memory(num_blocks: int = 32) -> KvMemory:
    return allocate_kv_memory(
        ContextModel.kv_layout, num_blocks=num_blocks, block_size=BLOCK, device=torch.device("cpu")
    )


def make_runner(
    *,
    model: ContextModel | None = None,
    num_rows: int = 4,
    memory: KvMemory | None = None,
    agent: KvAgent | None = None,
) -> ModelRunner:
    memory = memory or make_memory()
    info = RankInfo(
        num_blocks=len(memory.blocks),
        block_size=BLOCK,
        max_num_requests=num_rows,
        max_model_len=40,
        vocab_size=VOCAB,
        kv_descriptors=dict(agent.descriptors) if agent else {},
    )
    return ModelRunner(
        model=model or ContextModel(),
        groups=ProcessGroups.single(),
        memory=memory,
        info=info,
        device=torch.device("cpu"),
        agent=agent,
    )
