"""Latent attention for CPUs: rows with few queries absorbed, those with many expanded, sparse ones gathered.

Decodes and drafts are what the paged attention of this backend does with one key/value head, whose values are the
leading dims of its keys. Rows with more queries are attended to one by one, in tiles that bound memory: all heads at
once in the absorbed form, some heads in the expanded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from atom_cluster.ops.attention import AttentionMetadata, AttentionPlan, KvLayerCache, PlanAttention, Rotation
from atom_cluster.ops.cpu.attention import MAX_GROUP_QUERIES, attention_planner
from atom_cluster.ops.cpu.norm import rms_norm
from atom_cluster.ops.cpu.rotary import rotary
from atom_cluster.ops.mla import LatentNorm, LatentWeights, MlaDims, MlaPlan, PlanMla
from atom_cluster.ops.torch_ref.paged import PagedRows

MAX_EXPANDED = 1 << 23
"""Elements of keys and values that a tile of heads expands at most, unless a single head has more."""

MAX_GATHERED = 1 << 23
"""Elements of latents that a tile of sparse tokens gathers at most, unless a single token has more."""

MAX_SCORES = 1 << 23
"""Scores that a tile of an absorbed row computes at most, unless a single query has more."""

TILE_QUERIES = 256
"""Query positions of an expanded row per call; bounds the scores."""


@dataclass(frozen=True, slots=True)
class _Split:
    """How the rows of a step are attended to."""

    grouped: AttentionPlan | None
    grouped_tokens: torch.Tensor | slice
    absorbed_rows: tuple[int, ...]
    expanded_rows: tuple[int, ...]
    sparse_tokens: torch.Tensor
    sparse_rows: torch.Tensor
    """The row of each of the sparse tokens."""


class CpuMla:
    """Latent attention of one step."""

    def __init__(self, metadata: AttentionMetadata, dims: MlaDims, plan_attention: PlanAttention) -> None:
        self._metadata = metadata
        self._dims = dims
        self._plan_attention = plan_attention
        self._rows = PagedRows(metadata)
        self._splits: dict[int | None, _Split] = {}

    def store(
        self,
        latent_TL: torch.Tensor,
        key_TP: torch.Tensor,
        query_THP: torch.Tensor,
        kv: KvLayerCache,
        *,
        norm: LatentNorm,
        rotation: Rotation,
        is_interleaved: bool,
    ) -> torch.Tensor:
        """Norm, rotate, and write latents and keys to their slots."""
        query_THP, key_T1P = rotary(
            query_THP, key_TP[:, None], rotation.cos_T1P, rotation.sin_T1P, is_interleaved=is_interleaved
        )
        latent_TL = rms_norm(latent_TL, norm.weight_L, norm.eps)
        self._rows.store(torch.cat((latent_TL, key_T1P[:, 0]), dim=-1), kv)
        return query_THP

    def attend(
        self,
        query_THN: torch.Tensor,
        rope_THP: torch.Tensor,
        weights: LatentWeights,
        kv: KvLayerCache,
        *,
        scale: float,
        selected_TK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of the step's queries over their rows' latents."""
        split = self._split(None if selected_TK is None else selected_TK.shape[1])
        out_THV = query_THN.new_empty(*query_THN.shape[:2], self._dims.value_dim)
        if split.grouped is not None:
            tokens = split.grouped_tokens
            query_THS = torch.cat((weights.absorb(query_THN[tokens]), rope_THP[tokens]), dim=-1)
            latents = replace(kv, value=kv.key[..., : self._dims.latent_dim], value_scale=kv.key_scale)
            out_THV[tokens] = weights.project_values(split.grouped.attend(query_THS, latents, scale=scale))
        for row in split.absorbed_rows:
            tokens = self._rows.tokens[row]
            query_QHS = torch.cat((weights.absorb(query_THN[tokens]), rope_THP[tokens]), dim=-1)
            out_THV[tokens] = weights.project_values(self._absorbed(row, query_QHS, kv, scale))
        for row in split.expanded_rows:
            tokens = self._rows.tokens[row]
            self._expand(row, query_THN[tokens], rope_THP[tokens], weights, kv, scale, out_THV[tokens])
        if selected_TK is not None and len(split.sparse_tokens):
            tokens = split.sparse_tokens
            query_THS = torch.cat((weights.absorb(query_THN[tokens]), rope_THP[tokens]), dim=-1)
            mixed_THL = self._gathered(query_THS, selected_TK[tokens], split.sparse_rows, kv, scale)
            out_THV[tokens] = weights.project_values(mixed_THL)
        return out_THV

    def _split(self, num_selected: int | None) -> _Split:
        """For layers whose tokens select so many positions, or None."""
        if num_selected not in self._splits:
            self._splits[num_selected] = self._make_split(num_selected)
        return self._splits[num_selected]

    def _make_split(self, num_selected: int | None) -> _Split:
        limit = self._dims.max_absorbed_queries
        grouped, absorbed, expanded, sparse = [], [], [], []
        for row, tokens in enumerate(self._rows.tokens):
            num_queries = tokens.stop - tokens.start
            if num_selected is not None and self._metadata.context_len_cpu[row] > num_selected:
                sparse.append(row)
            elif limit is not None and num_queries > limit:
                expanded.append(row)
            elif num_queries <= MAX_GROUP_QUERIES:
                grouped.append(row)
            else:
                absorbed.append(row)
        sparse_rows = [row for row in sparse for _ in range(self._rows.tokens[row].start, self._rows.tokens[row].stop)]
        is_all = len(grouped) == len(self._rows.tokens)
        metadata = self._metadata if is_all else _of_rows(self._metadata, grouped, self._tokens(grouped))
        return _Split(
            grouped=self._plan_attention(metadata) if grouped else None,
            grouped_tokens=slice(None) if is_all else self._tokens(grouped),
            absorbed_rows=tuple(absorbed),
            expanded_rows=tuple(expanded),
            sparse_tokens=self._tokens(sparse),
            sparse_rows=torch.tensor(sparse_rows, dtype=torch.int64),
        )

    def _tokens(self, rows: Sequence[int]) -> torch.Tensor:
        """The tokens of some rows."""
        ranges = [torch.arange(self._rows.tokens[row].start, self._rows.tokens[row].stop) for row in rows]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)

    def _absorbed(self, row: int, query_QHS: torch.Tensor, kv: KvLayerCache, scale: float) -> torch.Tensor:
        """Mixtures of the latents of one row, [Q, H, L], for absorbed queries."""
        wide = torch.promote_types(query_QHS.dtype, torch.float32)
        stored_CS = self._rows.gather(row, kv, wide)
        mixtures = []
        size = max(1, MAX_SCORES // (self._dims.num_heads * len(stored_CS)))
        for start in range(0, len(query_QHS), size):
            tile = slice(start, start + size)
            query, is_visible = query_QHS[tile].to(wide), self._rows.visible(row, tile)
            scores_QHC = torch.matmul(query.flatten(0, 1), stored_CS.T).view(*query.shape[:2], -1).mul_(scale)
            weight_QHC = scores_QHC.masked_fill_(~is_visible[:, None], float("-inf")).softmax(dim=-1)
            mixed = torch.matmul(weight_QHC.flatten(0, 1), stored_CS[:, : self._dims.latent_dim])
            mixtures.append(mixed.view(*query.shape[:2], -1))
        return torch.cat(mixtures).to(query_QHS.dtype)

    def _expand(
        self,
        row: int,
        query_QHN: torch.Tensor,
        rope_QHP: torch.Tensor,
        weights: LatentWeights,
        kv: KvLayerCache,
        scale: float,
        out_QHV: torch.Tensor,
    ) -> None:
        """Fill in the output of one row."""
        dims = self._dims
        stored_CS = self._rows.gather(row, kv, query_QHN.dtype)
        latent_CL, rope_CP = stored_CS.tensor_split([dims.latent_dim], -1)
        num_queries, num_keys = len(query_QHN), len(stored_CS)
        per_head = num_keys * (dims.nope_dim + dims.rope_dim + dims.value_dim)
        num_heads = max(1, MAX_EXPANDED // per_head)
        for head in range(0, dims.num_heads, num_heads):
            heads = slice(head, head + num_heads)
            key_ChN, value_ChV = weights.expand(latent_CL, heads)
            rope_ChP = rope_CP[:, None].expand(-1, key_ChN.shape[1], -1)
            key_hCD = torch.cat((key_ChN, rope_ChP), dim=-1).transpose(0, 1)
            query_hQD = torch.cat((query_QHN[:, heads], rope_QHP[:, heads]), dim=-1).transpose(0, 1)
            for start in range(0, num_queries, TILE_QUERIES):
                end = min(start + TILE_QUERIES, num_queries)
                seen = num_keys - num_queries + end
                is_visible = self._rows.visible(row, slice(start, end))[:, :seen]
                out_hQV = F.scaled_dot_product_attention(
                    query_hQD[None, :, start:end],
                    key_hCD[None, :, :seen],
                    value_ChV.transpose(0, 1)[None, :, :seen],
                    attn_mask=is_visible,
                    scale=scale,
                )
                out_QHV[start:end, heads] = out_hQV[0].transpose(0, 1)

    def _gathered(
        self,
        query_THS: torch.Tensor,
        position_TK: torch.Tensor,
        row_T: torch.Tensor,
        kv: KvLayerCache,
        scale: float,
    ) -> torch.Tensor:
        """Mixtures of the selected latents, [T, H, L], for absorbed queries."""
        wide = torch.promote_types(query_THS.dtype, torch.float32)
        block_size = self._metadata.block_size
        mixtures = []
        size = max(1, MAX_GATHERED // (position_TK.shape[1] * query_THS.shape[2]))
        for query, position, row in zip(*(torch.split(part, size) for part in (query_THS, position_TK, row_T))):
            known = position.clamp(min=0).long()
            block = self._metadata.block_table[row[:, None], known // block_size].long()
            latent_TKS = kv.key[block, known % block_size, 0].to(wide) * kv.key_scale
            scores_THK = torch.matmul(query.to(wide), latent_TKS.transpose(1, 2)) * scale
            weight_THK = scores_THK.masked_fill((position < 0)[:, None], float("-inf")).softmax(dim=-1)
            mixtures.append(torch.matmul(weight_THK, latent_TKS[..., : self._dims.latent_dim]))
        return torch.cat(mixtures).to(query_THS.dtype)


def mla_planner(dtype: torch.dtype) -> PlanMla:
    """The op for queries of `dtype`."""
    plan_attention = attention_planner(dtype)

    def plan_mla(metadata: AttentionMetadata, dims: MlaDims) -> MlaPlan:
        return CpuMla(metadata, dims, plan_attention)

    return plan_mla


def _of_rows(metadata: AttentionMetadata, rows: Sequence[int], tokens: torch.Tensor) -> AttentionMetadata:
    """A step of some of the rows. `tokens`: theirs."""
    starts = metadata.query_start_cpu
    new_starts = [0]
    for row in rows:
        new_starts.append(new_starts[-1] + starts[row + 1] - starts[row])
    index = torch.tensor(rows, dtype=torch.int64)
    return replace(
        metadata,
        num_decode_rows=sum(row < metadata.num_decode_rows for row in rows),
        query_start=torch.tensor(new_starts, dtype=torch.int32),
        context_len=metadata.context_len[index],
        block_table=metadata.block_table[index],
        slot=metadata.slot[tokens],
        query_start_cpu=tuple(new_starts),
        context_len_cpu=tuple(metadata.context_len_cpu[row] for row in rows),
    )
