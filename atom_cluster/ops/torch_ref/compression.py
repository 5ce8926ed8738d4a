"""Reference compression: all entries of a step at once, their slots gathered. Any device; never waits for it.

How many entries a step completes is known to the device alone, so of each row as many are computed as its tokens could
complete. One of them may be of a group that is not complete: it is wrong, and written where nobody looks until a later
step has completed it.
"""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.compression import CompressionPlan
from atom_cluster.ops.torch_ref.attention import as_stored
from atom_cluster.units import ceil_div


class GatheredCompression:
    """Compression of one step."""

    def __init__(
        self, tokens: AttentionMetadata, entries: AttentionMetadata, tokens_per_entry: int, num_series: int
    ) -> None:
        self._num_series = num_series
        self._page_T, self._offset_T = tokens.slot // tokens.block_size, tokens.slot % tokens.block_size
        row_N, entry_N = _rows_and_entries(tokens, tokens_per_entry)
        newest_N = tokens.context_len.long()[row_N] - 1
        self._first_positions = entry_N * tokens_per_entry
        last_N = self._first_positions + tokens_per_entry - 1
        before_S = torch.arange(tokens_per_entry * num_series - 1, -1, -1, device=last_N.device)
        position_NS = last_N[:, None] - before_S
        self._is_missing_NS = position_NS < 0
        position_NS = position_NS.clamp(min=0).minimum(newest_N[:, None])
        page_NS = tokens.block_table[row_N[:, None], position_NS // tokens.block_size].long()
        self._source_NS = page_NS, position_NS % tokens.block_size
        # An incomplete entry's page may not be there yet: the page of the newest token then has an entry to spare.
        page_N = entries.block_table[row_N, last_N.minimum(newest_N) // entries.block_size].long()
        self._target_N = page_N, last_N % entries.block_size // tokens_per_entry

    @property
    def first_positions(self) -> torch.Tensor:
        """Of the entries' groups."""
        return self._first_positions

    def pool(
        self, value_TC: torch.Tensor, gate_TC: torch.Tensor, bias_SD: torch.Tensor, inputs: KvLayerCache
    ) -> torch.Tensor:
        """Write values and gates, then gather and pool."""
        inputs.key[self._page_T, self._offset_T, 0] = value_TC
        inputs.value[self._page_T, self._offset_T, 0] = gate_TC
        value_NSD, gate_NSD = self._slots(inputs.key), self._slots(inputs.value).to(bias_SD.dtype) + bias_SD
        gate_NSD = gate_NSD.masked_fill(self._is_missing_NS[..., None], float("-inf"))
        return (value_NSD.to(bias_SD.dtype) * gate_NSD.softmax(dim=1)).sum(dim=1)

    def _slots(self, paged: torch.Tensor) -> torch.Tensor:
        """Of each entry's slots, the dims of their series, [N, S, D]."""
        found_NSC = paged[(*self._source_NS, 0)]
        if self._num_series == 1:
            return found_NSC
        before_NSC, own_NSC = found_NSC.chunk(2, dim=1)
        return torch.cat((before_NSC.chunk(2, dim=-1)[0], own_NSC.chunk(2, dim=-1)[1]), dim=1)

    def store(self, entry_ND: torch.Tensor, entries: KvLayerCache) -> None:
        """Write entries to their places."""
        entries.key[(*self._target_N, 0)] = as_stored(entry_ND, entries.key.dtype, entries.key_scale)


def plan_compression(
    tokens: AttentionMetadata, entries: AttentionMetadata, *, tokens_per_entry: int, num_series: int
) -> CompressionPlan:
    """The plan of one step."""
    return GatheredCompression(tokens, entries, tokens_per_entry, num_series)


def _rows_and_entries(metadata: AttentionMetadata, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and numbers within them, of the entries that the step's tokens could complete, [N] int64 each."""
    starts = metadata.query_start_cpu
    num_entries = sum(ceil_div(end - start, size) for start, end in zip(starts, starts[1:]))
    num_tokens_R = metadata.query_start.diff().long()
    count_R = (num_tokens_R + size - 1) // size
    row_N = torch.repeat_interleave(count_R, output_size=num_entries)
    first_R = (metadata.context_len - num_tokens_R) // size - (count_R.cumsum(0) - count_R)
    return row_N, first_R[row_N] + torch.arange(num_entries, device=row_N.device)
