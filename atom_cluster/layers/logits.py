"""The output head: logits over the vocabulary, of which each rank computes a part. Knows no sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.embedding import VocabularyShard
from atom_cluster.layers.module import Module
from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertsOp
from atom_cluster.parallel.collectives import gather_last_dim
from atom_cluster.parallel.groups import Group
from atom_cluster.parallel.sharding import WeightPart


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits of S samples over the vocabulary, divided among the ranks of a group."""

    part: torch.Tensor
    """[S, V'] float32, equally many on all ranks; the last ones have columns that stand for no token."""
    vocab_size: int
    group: Group

    @property
    def first_token_id(self) -> int:
        """The token of this rank's first column; the size of the vocabulary or more if it has none."""
        return self.group.rank * self.part.shape[1]

    @property
    def own(self) -> torch.Tensor:
        """This rank's columns that stand for tokens; there may be none."""
        return self.part[:, : max(0, self.vocab_size - self.first_token_id)]

    def gather(self) -> torch.Tensor:
        """[S, V] over the full vocabulary, on every rank. All ranks must call it."""
        return gather_last_dim(self.part, self.group)[:, : self.vocab_size]


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
        dtype = self._context.dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.op = self._context.ops.prepare_linear(rows_VD, None, dtype=dtype, out_dtype=wide)
        self._shards.clear()

    def linear_ops(self) -> list[LinearOp | ExpertsOp]:
        """The one product."""
        return [self.op]

    def __call__(self, hidden_SD: torch.Tensor) -> Logits:
        """[S, D] -> logits of S samples."""
        return Logits(self.op(hidden_SD).float(), self._vocab_size, self._context.groups.tensor)

    def _unfinished_shard(self) -> VocabularyShard:
        if not self._shards:
            raise RuntimeError("the head's weights were handed to the op backend already")
        return self._shards[0]
