"""The output head: logits over the vocabulary, split over the ranks and gathered on rank 0. Knows no sampling."""

from __future__ import annotations

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.embedding import VocabularyShard
from atom_cluster.layers.module import Module
from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertsOp
from atom_cluster.parallel.collectives import gather_last_dim
from atom_cluster.parallel.sharding import WeightPart


class LogitsHead(Module):
    """Applies a vocabulary matrix: its own, or the embedding's when tied. Never quantized."""

    op: LinearOp
    """Set by `finish_loading`."""

    def __init__(self, context: LayerContext, shard: VocabularyShard, *, is_tied: bool) -> None:
        """is_tied: `shard` is loaded by another layer."""
        self._context = context
        self._vocab_size = shard.vocab_size
        self._is_tied = is_tied
        # A list hides it from `Module.parts`: what is tied must not be found twice.
        self._shards = [shard]

    def weight_parts(self) -> dict[str, WeightPart]:
        """Where the checkpoint's tensor goes, by its full name; nothing when tied."""
        return {} if self._is_tied else self._unfinished_shard().weight_parts()

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend."""
        rows_VD = self._unfinished_shard().rows_VD
        self.op = self._context.ops.prepare_linear(rows_VD, None, dtype=self._context.dtype)
        self._shards.clear()

    def linear_ops(self) -> list[LinearOp | ExpertsOp]:
        """The one product."""
        return [self.op]

    def __call__(self, hidden_SD: torch.Tensor) -> torch.Tensor | None:
        """[S, D] -> [S, full vocabulary] float32 on rank 0, None on the others. All ranks must call it."""
        logits = gather_last_dim(self.op(hidden_SD), self._context.groups.tensor)
        return None if logits is None else logits[:, : self._vocab_size].float()

    def _unfinished_shard(self) -> VocabularyShard:
        if not self._shards:
            raise RuntimeError("the head's weights were handed to the op backend already")
        return self._shards[0]
