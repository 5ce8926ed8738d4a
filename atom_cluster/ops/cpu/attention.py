"""Paged attention for CPUs: a few large tensor ops per layer; everything that layers share is computed once per step.

Decode rows of similar length form groups; a group's KV is gathered into one padded tensor and attended to in one call.
The query heads of one key/value head are passed as its query positions, so KV is never repeated for them. Prefill rows
are attended to one by one, in tiles of queries that see only the keys before their end. KV memory holds finite numbers
everywhere (it starts zeroed): padding is read, though it has no weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from atom_cluster.ops.attention import AttentionMetadata, AttentionPlan, KvLayerCache, PlanAttention
from atom_cluster.units import ceil_div

MAX_GROUP_TOKENS = 4096
"""Padded KV tokens that one group gathers at most, unless a single row has more: what stays in cache."""

TILE_QUERIES = 256
"""Query positions of a prefill row per call; bounds the mask."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows attended to together."""

    rows: torch.Tensor | None
    """Their indices; None when they are all decode rows, in order."""
    blocks: torch.Tensor
    """[rows of the group * blocks per row]: blocks to gather."""
    bias: torch.Tensor
    """[G, 1, 1, C], added to scores: 0 where the row has a token, -inf behind its end."""

    def attend(self, query_RHD: torch.Tensor, kv: KvLayerCache, scale: float) -> torch.Tensor:
        """[G, H, D]"""
        num_rows, num_keys = self.bias.shape[0], self.bias.shape[-1]
        num_heads = query_RHD.shape[1]
        num_kv_heads, value_dim = kv.value.shape[2:]
        query = query_RHD if self.rows is None else query_RHD[self.rows]
        query = query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, -1)
        key = kv.key.index_select(0, self.blocks).view(num_rows, num_keys, num_kv_heads, -1).transpose(1, 2)
        value = kv.value.index_select(0, self.blocks).view(num_rows, num_keys, num_kv_heads, -1).transpose(1, 2)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias, scale=scale)
        return output.reshape(num_rows, num_heads, value_dim)


@dataclass(frozen=True, slots=True)
class _PrefillRow:
    """A row with several queries, or one behind such a row: the last of its `context_len` tokens."""

    first_token: int
    num_queries: int
    context_len: int
    blocks: torch.Tensor

    def attend(
        self, query_THD: torch.Tensor, kv: KvLayerCache, *, scale: float, bias_QC: torch.Tensor, out_THD: torch.Tensor
    ) -> None:
        """Fill in the row's part of `out_THD`."""
        key = kv.key.index_select(0, self.blocks).flatten(0, 1).transpose(0, 1)[None]
        value = kv.value.index_select(0, self.blocks).flatten(0, 1).transpose(0, 1)[None]
        num_cached = self.context_len - self.num_queries
        for start in range(0, self.num_queries, TILE_QUERIES):
            end = min(start + TILE_QUERIES, self.num_queries)
            num_keys = num_cached + end
            tokens = slice(self.first_token + start, self.first_token + end)
            output = F.scaled_dot_product_attention(
                query_THD[tokens].transpose(0, 1)[None],
                key[:, :, :num_keys],
                value[:, :, :num_keys],
                attn_mask=bias_QC[start - end :, -num_keys:][None, None],
                scale=scale,
                enable_gqa=True,
            )
            out_THD[tokens] = output[0].transpose(0, 1)


class CpuAttention:
    """Attention of one step, for queries of `dtype`."""

    def __init__(self, metadata: AttentionMetadata, dtype: torch.dtype) -> None:
        self._block_T = metadata.slot // metadata.block_size
        self._offset_T = metadata.slot % metadata.block_size
        self._num_decode_rows = metadata.num_decode_rows
        self._groups = decode_groups(metadata, dtype)
        self._prefills = _prefill_rows(metadata)
        self._bias_QC = _causal_bias(self._prefills, dtype)

    def store(self, key_TKD: torch.Tensor, value_TKD: torch.Tensor, kv: KvLayerCache) -> None:
        """Write the step's keys and values to their slots."""
        index = (self._block_T, self._offset_T)
        kv.key.index_put_(index, key_TKD)
        kv.value.index_put_(index, value_TKD)

    def attend(
        self, query_THD: torch.Tensor, kv: KvLayerCache, *, scale: float, sink_H: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal attention of the step's queries over their rows' KV."""
        if not self._prefills and self._groups[0].rows is None:
            return self._groups[0].attend(query_THD, kv, scale)
        num_tokens, num_heads, _ = query_THD.shape
        out_THD = query_THD.new_empty(num_tokens, num_heads, kv.value.shape[-1])
        for group in self._groups:
            rows = slice(self._num_decode_rows) if group.rows is None else group.rows
            out_THD[rows] = group.attend(query_THD[: self._num_decode_rows], kv, scale)
        for row in self._prefills:
            row.attend(query_THD, kv, scale=scale, bias_QC=self._bias_QC, out_THD=out_THD)
        return out_THD


def attention_planner(dtype: torch.dtype) -> PlanAttention:
    """The op for queries of `dtype`, in which masks are made."""

    def plan_attention(metadata: AttentionMetadata) -> AttentionPlan:
        return CpuAttention(metadata, dtype)

    return plan_attention


def decode_groups(metadata: AttentionMetadata, dtype: torch.dtype) -> list[DecodeGroup]:
    """Longest rows first; a group takes rows down to half its longest, as long as it stays small."""
    num_rows = metadata.num_decode_rows
    num_blocks = [ceil_div(length, metadata.block_size) for length in metadata.context_len_cpu[:num_rows]]
    max_blocks = ceil_div(MAX_GROUP_TOKENS, metadata.block_size)
    members: list[list[int]] = []
    for row in sorted(range(num_rows), key=lambda row: -num_blocks[row]):
        longest = num_blocks[members[-1][0]] if members else 0
        if longest <= 2 * num_blocks[row] and members and longest * (len(members[-1]) + 1) <= max_blocks:
            members[-1].append(row)
        else:
            members.append([row])
    if len(members) == 1:
        return [_decode_group(metadata, None, num_blocks[members[0][0]], dtype)]
    return [_decode_group(metadata, group, num_blocks[group[0]], dtype) for group in members]


def _decode_group(
    metadata: AttentionMetadata, rows: list[int] | None, num_blocks: int, dtype: torch.dtype
) -> DecodeGroup:
    row_G = None if rows is None else torch.tensor(rows)
    index = slice(metadata.num_decode_rows) if row_G is None else row_G
    block_GB = metadata.block_table[index, :num_blocks]
    length_G1 = metadata.context_len[index, None]
    is_behind = torch.arange(num_blocks * metadata.block_size) >= length_G1
    bias_GC = torch.zeros(is_behind.shape, dtype=dtype).masked_fill_(is_behind, float("-inf"))
    return DecodeGroup(row_G, block_GB.reshape(-1), bias_GC[:, None, None])


def _prefill_rows(metadata: AttentionMetadata) -> list[_PrefillRow]:
    rows = []
    starts = metadata.query_start_cpu
    for row in range(metadata.num_decode_rows, len(metadata.context_len_cpu)):
        context_len = metadata.context_len_cpu[row]
        block_B = metadata.block_table[row, : ceil_div(context_len, metadata.block_size)]
        rows.append(_PrefillRow(starts[row], starts[row + 1] - starts[row], context_len, block_B))
    return rows


def _causal_bias(rows: list[_PrefillRow], dtype: torch.dtype) -> torch.Tensor:
    """One mask for all tiles, aligned at the lower right: t queries over k keys use its last t rows and k columns."""
    if not rows:
        return torch.empty(0, 0)
    num_queries = min(TILE_QUERIES, max(row.num_queries for row in rows))
    num_keys = max(row.context_len for row in rows)
    bias_QC = torch.full((num_queries, num_keys), float("-inf"), dtype=dtype)
    return bias_QC.triu_(diagonal=num_keys - num_queries + 1)
