"""Drives a model as a runner would: rows with tokens so far, blocks scattered over KV memory, mixed steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import AttentionMetadata, ForwardBatch, KvLayerCache
from atom_cluster.models.protocol import CausalLM
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.units import ceil_div


def make_context(
    ops: OpTable, *, dtype: torch.dtype = torch.float32, groups: ProcessGroups | None = None
) -> LayerContext:
    return LayerContext(ops=ops, groups=groups or ProcessGroups.single(), dtype=dtype, device=torch.device("cpu"))


class PagedDriver:
    """Keeps rows and their KV; `step` advances some of them by the given tokens."""

    def __init__(self, model: CausalLM, *, num_blocks: int = 96, block_size: int = 4) -> None:
        layout = model.kv_layout
        dtype = getattr(torch, layout.dtype)
        # Block-major as in a runner, and full of large numbers where nothing was written, to notice a read of them.
        memory = torch.full((num_blocks, layout.bytes_per_block(block_size) // dtype.itemsize), 1e3, dtype=dtype)
        self._model = model
        self._block_size = block_size
        self._kv = _layer_views(memory, [layer.num_kv_heads for layer in layout.layers], layout.layers[0].key_dim)
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).tolist()
        self._blocks: dict[int, list[int]] = {}
        self._length: dict[int, int] = {}

    @torch.inference_mode()
    def step(self, rows: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor] | None:
        """[(row, new tokens)], rows of one token first -> logits of every new token per row; None on other ranks."""
        for row, tokens in rows:
            self._length[row] = self._length.get(row, 0) + len(tokens)
            blocks = self._blocks.setdefault(row, [])
            while len(blocks) * self._block_size < self._length[row]:
                blocks.append(self._free.pop())
        batch = self._batch(rows)
        hidden = self._model.forward(batch)
        logits = self._model.compute_logits(hidden[batch.sample_index])
        return None if logits is None else list(logits.split([len(tokens) for _, tokens in rows]))

    def _batch(self, rows: Sequence[tuple[int, Sequence[int]]]) -> ForwardBatch:
        lengths = tuple(self._length[row] for row, _ in rows)
        positions = [position for (_, tokens), end in zip(rows, lengths) for position in range(end - len(tokens), end)]
        row_of_token = [row for row, tokens in rows for _ in tokens]
        slots = [
            self._blocks[row][position // self._block_size] * self._block_size + position % self._block_size
            for row, position in zip(row_of_token, positions)
        ]
        starts = [0]
        for _, tokens in rows:
            starts.append(starts[-1] + len(tokens))
        table = torch.zeros(len(rows), ceil_div(max(lengths), self._block_size), dtype=torch.int32)
        for index, (row, _) in enumerate(rows):
            table[index, : len(self._blocks[row])] = torch.tensor(self._blocks[row])
        is_decode = [len(tokens) == 1 for _, tokens in rows] + [False]
        attention = AttentionMetadata(
            block_size=self._block_size,
            num_decode_rows=is_decode.index(False),
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_len=torch.tensor(lengths, dtype=torch.int32),
            block_table=table,
            slot=torch.tensor(slots),
            query_start_cpu=tuple(starts),
            context_len_cpu=lengths,
        )
        return ForwardBatch(
            token_ids=torch.tensor([token for _, tokens in rows for token in tokens]),
            positions=torch.tensor(positions),
            attention=attention,
            kv=self._kv,
            sample_index=torch.arange(len(positions)),
        )


def _layer_views(memory: torch.Tensor, num_heads: list[int], head_dim: int) -> tuple[KvLayerCache, ...]:
    num_blocks = memory.shape[0]
    pairs = memory.view(num_blocks, len(num_heads), 2, -1)
    return tuple(
        KvLayerCache(*(pairs[:, layer, which].unflatten(-1, (-1, heads, head_dim)) for which in (0, 1)))
        for layer, heads in enumerate(num_heads)
    )
