"""The rows of a step over paged keys with one head and no values: where tokens go, what they see. Any device."""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.torch_ref.attention import as_stored, places
from atom_cluster.units import ceil_div


class PagedRows:
    """Rows of one step.

    Shape suffixes: T tokens, D dims stored per entry, Q queries of a row, C entries of it: those of its cached tokens,
    or of some last blocks, which its window is in.
    """

    def __init__(self, metadata: AttentionMetadata, tokens_per_entry: int = 1) -> None:
        """tokens_per_entry: as in the cache's layout; with a window, 1."""
        self._metadata = metadata
        self._block_size, self._tokens_per_entry = metadata.block_size, tokens_per_entry
        starts = metadata.query_start_cpu
        self.tokens = tuple(slice(start, end) for start, end in zip(starts, starts[1:]))
        """Of each row, its tokens in the step."""
        self.num_entries = tuple(length // tokens_per_entry for length in metadata.context_len_cpu)
        """Of each row, entries up to its last token as the host knows it, those behind the window included."""

    def store(self, key_TD: torch.Tensor, kv: KvLayerCache) -> None:
        """Write the step's keys to their slots."""
        block_T, offset_T = places(self._metadata)
        kv.key[block_T, offset_T, 0] = as_stored(key_TD, kv.key.dtype, kv.key_scale)

    def gather(self, row: int, kv: KvLayerCache, dtype: torch.dtype) -> torch.Tensor:
        """A row's keys up to its last token, in order, [C, D] in `dtype`."""
        block_size, first, end = self._block_size, self._first_position(row), self.num_entries[row]
        # With several blocks to an entry, it is in the last of them.
        step = max(1, self._tokens_per_entry // block_size)
        columns = slice(first // block_size + step - 1, None, step)
        num_blocks = ceil_div(end - first, max(1, block_size // self._tokens_per_entry))
        blocks = self._metadata.block_table[row, columns][:num_blocks]
        key_CD = kv.key.index_select(0, blocks).flatten(0, 2)[: end - first].to(dtype)
        return key_CD if kv.key_scale == 1.0 else key_CD * kv.key_scale

    def visible(self, row: int, queries: slice = slice(None)) -> torch.Tensor:
        """Which entries some queries of a row see, [Q, C] bool."""
        tokens, window, device = self.tokens[row], self._metadata.window, self._metadata.context_len.device
        position_Q1 = torch.arange(tokens.start - tokens.stop, 0, device=device)[queries, None]
        position_Q1 = position_Q1 + self._metadata.context_len[row]
        entry_C = torch.arange(self._first_position(row), self.num_entries[row], device=device)
        is_visible_QC = entry_C < (position_Q1 + 1) // self._tokens_per_entry
        return is_visible_QC if window is None else is_visible_QC & (entry_C > position_Q1 - window)

    def _first_position(self, row: int) -> int:
        """A position at the start of a block and before the first that any of a row's queries sees."""
        window, tokens = self._metadata.window, self.tokens[row]
        if window is None:
            return 0
        # What the host takes for the row's length may be too much by some tokens, of two blocks at most.
        first_block = (self.num_entries[row] - (tokens.stop - tokens.start) - window + 1) // self._block_size
        return max(0, first_block - 2) * self._block_size


def selected_mask(position_QK: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Whether each of a row's entries was selected, [Q, C]; -1 marks the column behind the last, which is cut off."""
    is_selected = torch.zeros(len(position_QK), num_keys + 1, dtype=torch.bool, device=position_QK.device)
    columns = position_QK.long().masked_fill(position_QK < 0, num_keys)
    return is_selected.scatter_(1, columns, value=True)[:, :num_keys]
