"""Reference compression: all entries of a step at once, their slots gathered. Any device."""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache
from atom_cluster.ops.compression import CompressionPlan
from atom_cluster.ops.torch_ref.attention import as_stored


class GatheredCompression:
    """Compression of one step; its entries are those that the step's tokens complete."""

    def __init__(
        self, tokens: AttentionMetadata, entries: AttentionMetadata, tokens_per_entry: int, num_series: int
    ) -> None:
        self._num_series = num_series
        self._slot_T, self._block_size = tokens.slot, tokens.block_size
        row_T, position_T = _rows_and_positions(tokens)
        last_N = ((position_T + 1) % tokens_per_entry == 0).nonzero()[:, 0]
        num_slots = tokens_per_entry * num_series
        before_S = torch.arange(num_slots - 1, -1, -1, device=last_N.device)
        position_NS = position_T[last_N, None] - before_S
        self._is_before_first_NS = position_NS < 0
        position_NS = position_NS.clamp(min=0)
        page_NS = tokens.block_table[row_T[last_N, None], position_NS // tokens.block_size].long()
        self._source_NS = page_NS, position_NS % tokens.block_size
        slot_N = entries.slot[last_N]
        self._target_N = slot_N // entries.block_size, slot_N % entries.block_size // tokens_per_entry
        self._first_positions = position_T[last_N] - tokens_per_entry + 1

    @property
    def first_positions(self) -> torch.Tensor:
        """Of the entries' groups."""
        return self._first_positions

    def pool(
        self, value_TC: torch.Tensor, gate_TC: torch.Tensor, bias_SD: torch.Tensor, inputs: KvLayerCache
    ) -> torch.Tensor:
        """Write values and gates, then gather and pool."""
        page_T, offset_T = self._slot_T // self._block_size, self._slot_T % self._block_size
        inputs.key[page_T, offset_T, 0] = value_TC
        inputs.value[page_T, offset_T, 0] = gate_TC
        value_NSD, gate_NSD = self._slots(inputs.key), self._slots(inputs.value).to(bias_SD.dtype) + bias_SD
        gate_NSD = gate_NSD.masked_fill(self._is_before_first_NS[..., None], float("-inf"))
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


def _rows_and_positions(metadata: AttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token of the step its row and its position, [T] each."""
    start_R, num_R = metadata.query_start[:-1], metadata.query_start.diff()
    num_tokens, device = len(metadata.slot), metadata.slot.device
    row_T = torch.repeat_interleave(num_R.long(), output_size=num_tokens)
    first_R = metadata.context_len - num_R - start_R
    return row_T, torch.arange(num_tokens, device=device) + first_R.long()[row_T]
