"""Token embedding, its vocabulary split over the ranks of a tensor-parallel group. Knows no models."""

from __future__ import annotations

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.module import Module
from atom_cluster.parallel.collectives import all_reduce_sum
from atom_cluster.parallel.groups import Group
from atom_cluster.parallel.sharding import Span, WeightPart
from atom_cluster.units import ceil_div


class VocabularyShard(Module):
    """Rows of a [vocabulary, hidden] matrix on this rank. All ranks hold equally many; the last ones are padded.

    Its tensor is `<name>.weight`.
    """

    def __init__(self, context: LayerContext, *, vocab_size: int, hidden_size: int) -> None:
        group = context.groups.tensor
        num_rows = ceil_div(vocab_size, group.size)
        start = min(group.rank * num_rows, vocab_size)
        self._name = f"{context.name}.weight"
        self.vocab_size = vocab_size
        self.span = Span(start, min(num_rows, vocab_size - start))
        dtype = context.storage_dtype(["weight"])
        self.rows_VD = torch.zeros(num_rows, hidden_size, dtype=dtype, device=context.device)

    def weight_parts(self) -> dict[str, WeightPart]:
        """Where the checkpoint's tensor goes, by its full name."""
        full_shape = (self.vocab_size, self.rows_VD.shape[1])
        target = self.rows_VD[: self.span.length]
        return {self._name: WeightPart(target=target, full_shape=full_shape, cut=(self.span.as_slice,))}


class Embedding(Module):
    """Looks token ids up. Rows are kept in the checkpoint's dtype and widened after the lookup."""

    def __init__(self, context: LayerContext, *, vocab_size: int, hidden_size: int, factor: float = 1.0) -> None:
        """factor: multiplies the rows, in the dtype of activations."""
        self.shard = VocabularyShard(context, vocab_size=vocab_size, hidden_size=hidden_size)
        self._group: Group = context.groups.tensor
        self._dtype = context.dtype
        self._factor = factor
        self._look_up = context.ops.look_up

    def __call__(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """[T] int64 -> [T, D]"""
        is_split = self._group.size > 1
        shard = range(self.shard.span.start, self.shard.span.stop) if is_split else None
        rows_TD = self._look_up(self.shard.rows_VD, token_ids_T, dtype=self._dtype, factor=self._factor, shard=shard)
        return all_reduce_sum(rows_TD, self._group) if is_split else rows_TD
