"""Drives a model as a runner would: rows with tokens so far, blocks scattered over KV memory, mixed steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from atom_cluster.kv_cache.layout import DTYPE_BYTES, KvLayout, StateLayerLayout
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.forward_batch import (
    AttentionMetadata,
    ForwardBatch,
    KvLayerCache,
    LayerCache,
    StateLayerCache,
    StateMetadata,
)
from atom_cluster.models.protocol import CausalLM
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.units import ceil_div


def make_context(
    ops: OpTable,
    *,
    dtype: torch.dtype = torch.float32,
    groups: ProcessGroups | None = None,
    device: str = "cpu",
) -> LayerContext:
    return LayerContext(ops=ops, groups=groups or ProcessGroups.single(), dtype=dtype, device=torch.device(device))


class PagedDriver:
    """Keeps rows and what their layers leave behind; `step` advances some of them by the given tokens.

    Pages of windows that no later token sees are handed to other rows at once, and every step of a row writes its
    state to another page, so that a read of the wrong page shows. Memory starts full of large numbers.
    """

    def __init__(self, model: CausalLM, *, num_blocks: int = 96, block_size: int = 4, device: str = "cpu") -> None:
        self._model = model
        self._device = torch.device(device)
        self._block_size = block_size
        self._groups = model.kv_layout.groups
        self._caches = make_caches(model.kv_layout, num_pages=num_blocks, block_size=block_size, device=device)
        generator = torch.Generator().manual_seed(3)
        self._free = [torch.randperm(num_blocks, generator=generator).tolist() for _ in self._groups]
        self._pages: dict[int, list[list[int]]] = {}
        self._length: dict[int, int] = {}
        self._num_freed: dict[tuple[int, int], int] = {}

    @torch.inference_mode()
    def step(self, rows: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """[(row, new tokens)], rows of one token first -> logits of every new token per row, on every rank."""
        batch = self.batch(rows)
        hidden = self._model.forward(batch)
        logits = self._model.compute_logits(hidden[batch.sample_index]).gather()
        return list(logits.split([len(tokens) for _, tokens in rows]))

    def take_back(self, row: int, num_tokens: int) -> None:
        """The row's last tokens were not its own: others follow in their place. Not for models with states."""
        self._length[row] -= num_tokens

    def batch(self, rows: Sequence[tuple[int, Sequence[int]]]) -> ForwardBatch:
        """The inputs of a step, for which pages are taken."""
        states = []
        for row, tokens in rows:
            states.append(self._advance(row, len(tokens)))
        lengths = tuple(self._length[row] for row, _ in rows)
        positions = [position for (_, tokens), end in zip(rows, lengths) for position in range(end - len(tokens), end)]
        starts = [0]
        for _, tokens in rows:
            starts.append(starts[-1] + len(tokens))
        return ForwardBatch(
            token_ids=self._tensor([token for _, tokens in rows for token in tokens]),
            positions=self._tensor(positions),
            attention={
                group.window: self._metadata(index, rows, lengths, positions, starts)
                for index, group in enumerate(self._groups)
                if group.kind != "state"
            },
            caches=self._caches,
            sample_index=torch.arange(len(positions), device=self._device),
            state=self._state_metadata(states) if self._groups[-1].kind == "state" else None,
        )

    def _advance(self, row: int, num_tokens: int) -> tuple[int, int]:
        """Take pages for a row's next tokens; (page of its state before them or -1, page for the one after them)."""
        start = self._length.get(row, 0)
        end = self._length[row] = start + num_tokens
        pages = self._pages.setdefault(row, [[] for _ in self._groups])
        state = (-1, -1)
        for index, (group, held, free) in enumerate(zip(self._groups, pages, self._free)):
            if group.kind == "state":
                state = (held[0] if held else -1, free.pop())
                free[:0] = held
                held[:] = [state[1]]
                continue
            while len(held) * self._block_size < end:
                held.append(free.pop())
            if group.window is not None:
                num_behind = max(0, start - group.window + 1) // self._block_size
                free += held[self._num_freed.get((row, index), 0) : num_behind]
                self._num_freed[row, index] = num_behind
        return state

    def _metadata(
        self,
        group: int,
        rows: Sequence[tuple[int, Sequence[int]]],
        lengths: tuple[int, ...],
        positions: list[int],
        starts: list[int],
    ) -> AttentionMetadata:
        size = self._block_size
        row_of_token = [row for row, tokens in rows for _ in tokens]
        slots = [self._pages[row][group][p // size] * size + p % size for row, p in zip(row_of_token, positions)]
        table = torch.zeros(len(rows), ceil_div(max(lengths), size), dtype=torch.int32)
        for index, (row, _) in enumerate(rows):
            table[index, : len(self._pages[row][group])] = torch.tensor(self._pages[row][group])
        is_decode = [len(tokens) == 1 for _, tokens in rows] + [False]
        return AttentionMetadata(
            block_size=size,
            window=self._groups[group].window,
            num_decode_rows=is_decode.index(False),
            query_start=self._tensor(starts, torch.int32),
            context_len=self._tensor(lengths, torch.int32),
            block_table=table.to(self._device),
            slot=self._tensor(slots),
            query_start_cpu=tuple(starts),
            context_len_cpu=lengths,
        )

    def _state_metadata(self, states: list[tuple[int, int]]) -> StateMetadata:
        read, write = zip(*states)
        return StateMetadata(
            read_page=self._tensor(read), write_page=self._tensor(write)[:, None], keeps_all_cpu=(False,) * len(states)
        )

    def _tensor(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def make_caches(layout: KvLayout, *, num_pages: int, block_size: int, device: str = "cpu") -> tuple[LayerCache, ...]:
    """Memory of every layer, page-major and strided as in a runner."""
    caches: list[LayerCache | None] = [None] * len(layout.layers)
    for group in layout.groups:
        memory = torch.zeros(num_pages, layout.page_bytes(group, block_size), dtype=torch.uint8, device=device)
        offset = 0

        def take(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
            nonlocal offset
            end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
            view = memory[:, offset:end].view(getattr(torch, dtype)).view(num_pages, *shape)  # noqa: B023
            offset = end
            return view.fill_(300.0)

        for index in group.layers:
            layer = layout.layers[index]
            if isinstance(layer, StateLayerLayout):
                caches[index] = StateLayerCache({t.name: take(t.shape, t.dtype) for t in layer.tensors})
            else:
                dims = (layer.key_dim, layer.value_dim)
                rows = (layer.entries_per_page(block_size), layer.num_kv_heads)
                views = [take((*rows, dim), layer.dtype) for dim in dims]
                caches[index] = KvLayerCache(*views)
    assert None not in caches
    return tuple(cache for cache in caches if cache is not None)
