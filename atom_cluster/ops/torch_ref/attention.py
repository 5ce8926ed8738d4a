"""Reference paged attention: row by row, softmax written out. Any device; clarity over speed."""

from __future__ import annotations

import torch

from atom_cluster.ops.attention import AttentionMetadata, AttentionPlan, KvLayerCache
from atom_cluster.units import ceil_div


class RowByRowAttention:
    """Attention of one step."""

    def __init__(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata
        self._block_T = metadata.slot // metadata.block_size
        self._offset_T = metadata.slot % metadata.block_size

    def store(self, key_TKD: torch.Tensor, value_TKD: torch.Tensor, kv: KvLayerCache) -> None:
        """Write the step's keys and values to their slots."""
        kv.key[self._block_T, self._offset_T] = as_stored(key_TKD, kv.key.dtype, kv.key_scale)
        kv.value[self._block_T, self._offset_T] = as_stored(value_TKD, kv.value.dtype, kv.value_scale)

    def attend(
        self, query_THD: torch.Tensor, kv: KvLayerCache, *, scale: float, sink_H: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal attention of the step's queries over their rows' KV."""
        starts = self._metadata.query_start_cpu
        outputs = []
        for row, context_len in enumerate(self._metadata.context_len_cpu):
            query = query_THD[starts[row] : starts[row + 1]]
            first = self._first_position(len(query), context_len)
            key, value = (self._gather(row, first, context_len, paged) for paged in (kv.key, kv.value))
            outputs.append(_attend_row(query, key, value, scale * kv.key_scale, self._metadata.window, sink_H))
        return torch.cat(outputs) * kv.value_scale

    def _first_position(self, num_queries: int, context_len: int) -> int:
        """The first position that any of a row's queries sees, rounded down to a block."""
        window = self._metadata.window
        first = 0 if window is None else max(0, context_len - num_queries - window + 1)
        return first // self._metadata.block_size * self._metadata.block_size

    def _gather(self, row: int, first: int, context_len: int, paged: torch.Tensor) -> torch.Tensor:
        """The row's entries from position `first`, the start of a block, to its end, [positions, K, D]."""
        block_size = self._metadata.block_size
        columns = slice(first // block_size, ceil_div(context_len, block_size))
        blocks = paged[self._metadata.block_table[row, columns].long()]
        return blocks.flatten(0, 1)[: context_len - first]


def as_stored(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """x / scale in `dtype`: rounded, and in eight bits kept within what they hold."""
    scaled = x if scale == 1.0 else x / scale
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        scaled = scaled.clamp(-limit, limit)
    return scaled.to(dtype)


def plan_attention(metadata: AttentionMetadata) -> AttentionPlan:
    """The plan of one step."""
    return RowByRowAttention(metadata)


def _attend_row(
    query_QHD: torch.Tensor,
    key_CKD: torch.Tensor,
    value_CKD: torch.Tensor,
    scale: float,
    window: int | None,
    sink_H: torch.Tensor | None,
) -> torch.Tensor:
    """The last Q of C positions attend causally to all C, or to the last `window` that each sees."""
    wide = torch.promote_types(query_QHD.dtype, torch.float32)
    group = query_QHD.shape[1] // key_CKD.shape[1]
    key = key_CKD.to(wide).repeat_interleave(group, dim=1)
    value = value_CKD.to(wide).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,chd->hqc", query_QHD.to(wide), key) * scale
    num_queries, num_keys = scores.shape[1:]
    is_visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device)
    is_visible = is_visible.tril(diagonal=num_keys - num_queries)
    if window is not None:
        is_visible = is_visible.triu(diagonal=num_keys - num_queries - window + 1)
    scores = scores.masked_fill(~is_visible, float("-inf"))
    if sink_H is not None:
        scores = torch.cat((scores, sink_H.to(wide)[:, None, None].expand(-1, num_queries, 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., :num_keys]
    return torch.einsum("hqc,chd->qhd", weights, value).to(query_QHD.dtype)
