"""Paged attention for CPUs: a few large tensor ops per layer; everything that layers share is computed once per step.

Rows with few queries (decodes, drafts to verify) form groups of similar length; a group's KV is gathered into one
padded tensor and attended to in one call. The query heads of one key/value head are passed as its query positions, so
KV is never repeated for them. Other rows are attended to one by one, in tiles of queries that see only the keys before
their end. With a window, only blocks that some query of a row sees are gathered. KV memory holds finite numbers
everywhere (it starts zeroed): padding is read, though it has no weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from atom_cluster.ops.attention import (
    AttentionMetadata,
    AttentionPlan,
    HeadNorms,
    KvLayerCache,
    PlanAttention,
    Rotation,
)
from atom_cluster.ops.cpu.norm import rms_norm
from atom_cluster.ops.cpu.rotary import rotary
from atom_cluster.ops.torch_ref.attention import as_stored
from atom_cluster.units import ceil_div

MAX_GROUP_TOKENS = 4096
"""Padded KV tokens that one group gathers at most, unless a single row has more: what stays in cache."""

MAX_GROUP_QUERIES = 8
"""Queries of rows that are attended to in groups."""

TILE_QUERIES = 256
"""Query positions per call of a row that is attended to alone; bounds the mask."""


@dataclass(frozen=True, slots=True)
class _Row:
    """The last `num_queries` of a row's `context_len` tokens, and the blocks that they see."""

    index: int
    first_token: int
    num_queries: int
    context_len: int
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows with equally many queries, attended to together."""

    tokens: torch.Tensor | None
    """Indices of their tokens, row by row; None when they are all tokens of the step, in order."""
    blocks: torch.Tensor
    """[rows of the group * blocks per row]: blocks to gather."""
    bias: torch.Tensor
    """[G, 1, Q, C], added to scores: 0 where the query sees the token, else -inf."""

    def attend(
        self, query_THD: torch.Tensor, kv: KvLayerCache, scale: float, sink_H: torch.Tensor | None
    ) -> torch.Tensor:
        """[G * Q, H, value dim], contiguous"""
        (num_rows, _, num_queries, num_keys), num_heads = self.bias.shape, query_THD.shape[1]
        num_kv_heads, value_dim = kv.value.shape[2:]
        heads_per_kv = num_heads // num_kv_heads
        key = _gather(kv.key, self.blocks, query_THD.dtype).view(num_rows, num_keys, num_kv_heads, -1)
        value = _gather(kv.value, self.blocks, query_THD.dtype).view(num_rows, num_keys, num_kv_heads, value_dim)
        query = query_THD if self.tokens is None else query_THD[self.tokens]
        bias = self.bias
        if num_queries == 1:
            folded = query.reshape(num_rows, num_kv_heads, heads_per_kv, -1)
        else:
            query = query.reshape(num_rows, num_queries, num_kv_heads, heads_per_kv, -1)
            folded = query.permute(0, 2, 3, 1, 4).reshape(num_rows, num_kv_heads, heads_per_kv * num_queries, -1)
            bias = bias.repeat(1, 1, heads_per_kv, 1)
        sink = None if sink_H is None else sink_H.repeat_interleave(num_queries).view(1, num_kv_heads, -1, 1)
        output = _softmax_product(folded, key.transpose(1, 2), value.transpose(1, 2), bias, scale, sink)
        if num_queries > 1:
            output = output.reshape(num_rows, num_kv_heads, heads_per_kv, num_queries, value_dim)
            output = output.permute(0, 3, 1, 2, 4)
        return output.reshape(num_rows * num_queries, num_heads, value_dim)


@dataclass(frozen=True, slots=True)
class _LoneRow:
    """A row with many queries."""

    row: _Row
    blocks: torch.Tensor
    first_position: int
    """Of the blocks."""
    window: int | None

    def attend(
        self,
        query_THD: torch.Tensor,
        kv: KvLayerCache,
        *,
        scale: float,
        sink_H: torch.Tensor | None,
        bias_QC: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        """Fill in the row's part of `out_THD`."""
        key = _gather(kv.key, self.blocks, query_THD.dtype).flatten(0, 1).transpose(0, 1)[None]
        value = _gather(kv.value, self.blocks, query_THD.dtype).flatten(0, 1).transpose(0, 1)[None]
        num_cached = self.row.context_len - self.row.num_queries - self.first_position
        for start in range(0, self.row.num_queries, TILE_QUERIES):
            end = min(start + TILE_QUERIES, self.row.num_queries)
            last_key = num_cached + end
            first_key = 0 if self.window is None else max(0, num_cached + start - self.window + 1)
            tokens = slice(self.row.first_token + start, self.row.first_token + end)
            output = _softmax_product(
                query_THD[tokens].transpose(0, 1)[None],
                key[:, :, first_key:last_key],
                value[:, :, first_key:last_key],
                bias_QC[start - end :, first_key - last_key :][None, None],
                scale,
                None if sink_H is None else sink_H[None, :, None, None],
            )
            out_THD[tokens] = output[0].transpose(0, 1)


class CpuAttention:
    """Attention of one step, for queries of `dtype`."""

    def __init__(self, metadata: AttentionMetadata, dtype: torch.dtype) -> None:
        self._block_T = metadata.slot // metadata.block_size
        self._offset_T = metadata.slot % metadata.block_size
        self._groups = row_groups(metadata, dtype)
        self._lone = [_lone_row(metadata, row) for row in _rows(metadata) if row.num_queries > MAX_GROUP_QUERIES]
        self._bias_QC = _band_bias(self._lone, metadata.window, dtype)

    def store(
        self,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKD: torch.Tensor,
        kv: KvLayerCache,
        *,
        norms: HeadNorms | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """Norm and rotate queries and keys, and write keys and values to their slots."""
        if norms is not None:
            query_THD = rms_norm(query_THD, norms.query_D, norms.eps)
            key_TKD = rms_norm(key_TKD, norms.key_D, norms.eps)
        if rotation is not None:
            query_THD, key_TKD = rotary(query_THD, key_TKD, rotation.cos_T1P, rotation.sin_T1P)
        index = (self._block_T, self._offset_T)
        kv.key.index_put_(index, as_stored(key_TKD, kv.key.dtype, kv.key_scale))
        kv.value.index_put_(index, as_stored(value_TKD, kv.value.dtype, kv.value_scale))
        return query_THD

    def attend(
        self, query_THD: torch.Tensor, kv: KvLayerCache, *, scale: float, sink_H: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal attention of the step's queries over their rows' KV."""
        # What is stored is keys and values over their scales: these go into the scores and the output.
        output_THD = self._attend_stored(query_THD, kv, scale * kv.key_scale, sink_H)
        return output_THD if kv.value_scale == 1.0 else output_THD * kv.value_scale

    def _attend_stored(
        self, query_THD: torch.Tensor, kv: KvLayerCache, scale: float, sink_H: torch.Tensor | None
    ) -> torch.Tensor:
        if not self._lone and self._groups[0].tokens is None:
            return self._groups[0].attend(query_THD, kv, scale, sink_H)
        out_THD = query_THD.new_empty(*query_THD.shape[:2], kv.value.shape[-1])
        for group in self._groups:
            out_THD[group.tokens] = group.attend(query_THD, kv, scale, sink_H)
        for row in self._lone:
            row.attend(query_THD, kv, scale=scale, sink_H=sink_H, bias_QC=self._bias_QC, out_THD=out_THD)
        return out_THD


def attention_planner(dtype: torch.dtype) -> PlanAttention:
    """The op for queries of `dtype`, in which masks are made."""

    def plan_attention(metadata: AttentionMetadata) -> AttentionPlan:
        return CpuAttention(metadata, dtype)

    return plan_attention


def row_groups(metadata: AttentionMetadata, dtype: torch.dtype) -> list[RowGroup]:
    """Rows with few queries, by their number and then by length.

    Longest rows first; a group takes rows down to half its longest, as long as it stays small.
    """
    max_blocks = ceil_div(MAX_GROUP_TOKENS, metadata.block_size)
    short = [row for row in _rows(metadata) if row.num_queries <= MAX_GROUP_QUERIES]
    groups: list[list[_Row]] = []
    for _, alike in groupby(sorted(short, key=_by_queries_and_length), key=lambda row: row.num_queries):
        members: list[_Row] = []
        for row in alike:
            longest = members[0].num_blocks if members else 0
            if not members or longest > 2 * row.num_blocks or longest * (len(members) + 1) > max_blocks:
                members = []
                groups.append(members)
            members.append(row)
    return [_row_group(metadata, members, dtype) for members in groups]


def _by_queries_and_length(row: _Row) -> tuple[int, int]:
    return row.num_queries, -row.num_blocks


def _rows(metadata: AttentionMetadata) -> list[_Row]:
    starts, block_size = metadata.query_start_cpu, metadata.block_size
    rows = []
    for index, context_len in enumerate(metadata.context_len_cpu):
        num_queries = starts[index + 1] - starts[index]
        first_block = 0
        if metadata.window is not None:
            first_block = max(0, context_len - num_queries - metadata.window + 1) // block_size
        num_blocks = ceil_div(context_len, block_size) - first_block
        rows.append(_Row(index, starts[index], num_queries, context_len, first_block, num_blocks))
    return rows


def _row_group(metadata: AttentionMetadata, members: list[_Row], dtype: torch.dtype) -> RowGroup:
    num_queries, num_blocks = members[0].num_queries, max(row.num_blocks for row in members)
    is_whole_step = len(members) * num_queries == metadata.query_start_cpu[-1]
    if is_whole_step:
        members = sorted(members, key=lambda row: row.index)
    index = slice(None) if is_whole_step else torch.tensor([row.index for row in members])
    if any(row.first_block for row in members):
        first_G1 = torch.tensor([row.first_block for row in members])[:, None]
        # Columns behind a row's blocks are masked; they only must be in the table.
        column_GB = (first_G1 + torch.arange(num_blocks)).clamp_(max=metadata.block_table.shape[1] - 1)
        block_GB = metadata.block_table[index].gather(1, column_GB)
    else:
        block_GB = metadata.block_table[index, :num_blocks]
    tokens = [row.first_token + query for row in members for query in range(num_queries)]
    return RowGroup(
        None if is_whole_step else torch.tensor(tokens),
        block_GB.reshape(-1),
        _group_bias(members, num_blocks * metadata.block_size, metadata, dtype),
    )


def _group_bias(members: list[_Row], num_keys: int, metadata: AttentionMetadata, dtype: torch.dtype) -> torch.Tensor:
    """[G, 1, Q, C]"""
    num_queries = members[0].num_queries
    first_query = [row.context_len - num_queries - row.first_block * metadata.block_size for row in members]
    position_GQ1 = torch.tensor(first_query)[:, None, None] + torch.arange(num_queries)[:, None]
    position_C = torch.arange(num_keys)
    is_hidden = position_C > position_GQ1
    if metadata.window is not None:
        is_hidden |= position_C <= position_GQ1 - metadata.window
    return torch.zeros(is_hidden.shape, dtype=dtype).masked_fill_(is_hidden, float("-inf"))[:, None]


def _lone_row(metadata: AttentionMetadata, row: _Row) -> _LoneRow:
    blocks = metadata.block_table[row.index, row.first_block : row.first_block + row.num_blocks]
    return _LoneRow(row, blocks, row.first_block * metadata.block_size, metadata.window)


def _band_bias(lone: list[_LoneRow], window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """One mask for all tiles, aligned at the lower right: t queries over k keys use its last t rows and k columns."""
    if not lone:
        return torch.empty(0, 0)
    num_queries = min(TILE_QUERIES, max(lone_row.row.num_queries for lone_row in lone))
    num_keys = max(lone_row.row.context_len for lone_row in lone)
    if window is not None:
        num_keys = min(num_keys, num_queries + window - 1)
    bias_QC = torch.full((num_queries, num_keys), float("-inf"), dtype=dtype)
    diagonal = num_keys - num_queries
    if window is None:
        return bias_QC.triu_(diagonal=diagonal + 1)
    return bias_QC.triu(diagonal=diagonal + 1) + bias_QC.tril_(diagonal=diagonal - window)


def _gather(paged: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[blocks, block size, K, D] in `dtype`"""
    return paged.index_select(0, blocks).to(dtype)


def _softmax_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """softmax(query @ key * scale + bias) @ value; of query heads [G, H, Q, D] and key/value heads [G, K, C, D].

    sink: a further score of every query that broadcasts to [G, H, Q, 1], for which there is no value.
    """
    if sink is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=True)
    wide = torch.promote_types(query.dtype, torch.float32)
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    scores = torch.matmul(query.to(wide), key.to(wide).transpose(-2, -1)).mul_(scale).add_(bias)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    # A sink so far above all scores that its power overflows leaves them no weight, as it should.
    total = weights.sum(-1, keepdim=True).add_((sink.to(wide) - highest).exp_())
    return torch.matmul(weights, value.to(wide)).div_(total).to(query.dtype)
