"""The rows of a step over paged keys with one head and no values: where tokens go, what they see. Any device."""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.torch_ref.attention import as_stored, visible
from atom_cluster.units import ceil_div


class PagedRows:
    """Rows of one step. Shape suffixes: T tokens, D dims stored per token, Q queries of a row, C its cached tokens."""

    def __init__(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata
        self._block_T = metadata.slot // metadata.block_size
        self._offset_T = metadata.slot % metadata.block_size
        starts = metadata.query_start_cpu
        self.tokens = tuple(slice(start, end) for start, end in zip(starts, starts[1:]))
        """Of each row, its tokens in the step."""

    def store(self, key_TD: torch.Tensor, kv: KvLayerCache) -> None:
        """Write the step's keys to their slots."""
        kv.key[self._block_T, self._offset_T, 0] = as_stored(key_TD, kv.key.dtype, kv.key_scale)

    def gather(self, row: int, kv: KvLayerCache, dtype: torch.dtype) -> torch.Tensor:
        """A row's keys up to its last token, in order, [C, D] in `dtype`."""
        context_len = self._metadata.context_len_cpu[row]
        blocks = self._metadata.block_table[row, : ceil_div(context_len, self._metadata.block_size)]
        key_CD = kv.key.index_select(0, blocks).flatten(0, 2)[:context_len].to(dtype)
        return key_CD if kv.key_scale == 1.0 else key_CD * kv.key_scale

    def visible(self, row: int, queries: slice = slice(None)) -> torch.Tensor:
        """Which positions some queries of a row see, [Q, C] bool."""
        return visible(self._metadata, row, queries)
