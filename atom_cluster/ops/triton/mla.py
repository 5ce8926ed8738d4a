"""Latent attention on GPUs: short rows absorbed, others expanded, sparse ones absorbed. Knows no layers.

Consecutive rows of one kind are attended to together. Which kind a row is depends on what the host knows about it, so
that a step whose shapes are static launches the same kernels whatever the device finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache, Rotation
from atom_cluster.ops.mla import LatentNorm, LatentWeights, MlaDims
from atom_cluster.ops.triton.mla_absorbed import attend_absorbed, choose_tiles
from atom_cluster.ops.triton.mla_expanded import ExpandedRows, attend_expanded, gather, plan_expanded_rows
from atom_cluster.ops.triton.mla_schedule import Blocks, count_row_blocks, count_token_blocks
from atom_cluster.ops.triton.mla_store import store

MAX_SHORT_QUERIES = 17
"""Queries of rows that are always absorbed: a newest token and its drafts, whatever the host takes for their length."""

MAX_EXPANDED = 1 << 27
"""Elements of keys and values that are expanded at once, unless a single head has more; bounds memory."""

MIN_BLOCKS_PER_PART = 1


class HeadWeights:
    """W_K and W_V of all heads as matrices, in the dtype of the activations."""

    def __init__(self, weight_HOL: torch.Tensor, nope_dim: int) -> None:
        self._weight_HOL, self._nope_dim = weight_HOL, nope_dim
        self._key_HNL, self._value_HLV = weight_HOL[:, :nope_dim], weight_HOL[:, nope_dim:].transpose(1, 2)

    def absorb(self, query_THN: torch.Tensor) -> torch.Tensor:
        """W_K^T q of each head."""
        return torch.bmm(query_THN.transpose(0, 1), self._key_HNL).transpose(0, 1)

    def expand(self, latent_CL: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(W_K c, W_V c) of some heads, as parts of one product."""
        weight_HOL = self._weight_HOL[heads]
        expanded = torch.mm(latent_CL, weight_HOL.flatten(0, 1).T).view(len(latent_CL), *weight_HOL.shape[:2])
        return expanded[..., : self._nope_dim], expanded[..., self._nope_dim :]

    def project_values(self, mixed_THL: torch.Tensor) -> torch.Tensor:
        """W_V of each head times its mixture of latents, contiguous."""
        out_THV = mixed_THL.new_empty(*mixed_THL.shape[:2], self._value_HLV.shape[-1])
        torch.bmm(mixed_THL.transpose(0, 1), self._value_HLV, out=out_THV.transpose(0, 1))
        return out_THV


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive rows of one kind."""

    rows: slice
    tokens: slice
    is_expanded: bool


class PagedMla:
    """Latent attention of one step."""

    def __init__(self, metadata: AttentionMetadata, dims: MlaDims) -> None:
        self._metadata, self._dims = metadata, dims
        self._runs = _runs(metadata, dims)
        self._expanded: dict[int, ExpandedRows] = {}
        self._blocks: dict[tuple[int | None, int, int], Blocks] = {}

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
        return store(
            latent_TL,
            key_TP,
            query_THP,
            kv,
            self._metadata.slot,
            block_size=self._metadata.block_size,
            norm=norm,
            rotation=rotation,
            is_interleaved=is_interleaved,
        )

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
        if selected_TK is not None:
            return self._absorb(None, query_THN, rope_THP, weights, kv, scale, selected_TK)
        if len(self._runs) == 1 and not self._runs[0].is_expanded:
            return self._absorb(0, query_THN, rope_THP, weights, kv, scale, None)
        out_THV = query_THN.new_empty(*query_THN.shape[:2], self._dims.value_dim)
        for index, run in enumerate(self._runs):
            if run.is_expanded:
                self._expand(index, query_THN, rope_THP, weights, kv, scale, out_THV)
            else:
                out_THV[run.tokens] = self._absorb(index, query_THN, rope_THP, weights, kv, scale, None)
        return out_THV

    def attend_latents(
        self, query_THL: torch.Tensor, rope_THP: torch.Tensor, kv: KvLayerCache, *, scale: float
    ) -> torch.Tensor:
        """Mixtures of latents, [T, H, L], for absorbed queries of steps that are absorbed as a whole."""
        return self._attend_run(0, query_THL, rope_THP, kv, scale, None)

    def _absorb(
        self,
        run: int | None,
        query_THN: torch.Tensor,
        rope_THP: torch.Tensor,
        weights: LatentWeights,
        kv: KvLayerCache,
        scale: float,
        selected_TK: torch.Tensor | None,
    ) -> torch.Tensor:
        """Of the tokens of a run, or of all tokens."""
        tokens = slice(None) if run is None else self._runs[run].tokens
        query_THL = weights.absorb(query_THN[tokens])
        return weights.project_values(self._attend_run(run, query_THL, rope_THP, kv, scale, selected_TK))

    def _attend_run(
        self,
        run: int | None,
        query_THL: torch.Tensor,
        rope_THP: torch.Tensor,
        kv: KvLayerCache,
        scale: float,
        selected_TK: torch.Tensor | None,
    ) -> torch.Tensor:
        """Mixtures of latents of the tokens of a run, or of all tokens."""
        dims, rows = self._dims, None if run is None else self._runs[run].rows
        first_token = 0 if run is None else self._runs[run].tokens.start
        starts = self._metadata.query_start_cpu
        longest = 1 if rows is None else _longest(starts[rows.start : rows.stop + 1])
        tiles = choose_tiles(longest * dims.num_heads, dims.latent_dim, dims.rope_dim, query_THL.dtype, kv)
        limit = 0 if selected_TK is None else selected_TK.shape[1]
        key = (run, limit, tiles.keys)
        if key not in self._blocks:
            count = (
                partial(count_token_blocks, self._metadata, limit=limit)
                if rows is None
                else partial(count_row_blocks, self._metadata, rows)
            )
            self._blocks[key] = count(size=tiles.keys, min_per_part=MIN_BLOCKS_PER_PART)
        mixed_HTL = attend_absorbed(
            query_THL.transpose(0, 1),
            rope_THP,
            kv,
            self._blocks[key],
            tiles,
            block_size=self._metadata.block_size,
            scale=scale,
            first_token=first_token,
            selected_TK=selected_TK,
        )
        return mixed_HTL.transpose(0, 1)

    def _expand(
        self,
        run: int,
        query_THN: torch.Tensor,
        rope_THP: torch.Tensor,
        weights: LatentWeights,
        kv: KvLayerCache,
        scale: float,
        out_THV: torch.Tensor,
    ) -> None:
        """Fill in the output of the tokens of a run, some heads at a time."""
        dims = self._dims
        if run not in self._expanded:
            self._expanded[run] = plan_expanded_rows(self._metadata, self._runs[run].rows)
        rows = self._expanded[run]
        stored_CS = gather(rows, kv, query_THN.dtype, block_size=self._metadata.block_size)
        latent_CL, rope_CP = stored_CS.tensor_split([dims.latent_dim], -1)
        size = max(1, MAX_EXPANDED // (rows.num_places * (dims.nope_dim + dims.value_dim)))
        for first in range(0, dims.num_heads, size):
            heads = slice(first, min(first + size, dims.num_heads))
            key_CHN, value_CHV = weights.expand(latent_CL, heads)
            attend_expanded(
                query_THN[:, heads],
                rope_THP[:, heads],
                key_CHN,
                rope_CP,
                value_CHV,
                rows,
                scale=scale,
                out_THV=out_THV[:, heads],
            )


def prepare_latent_weights(weight_HOL: torch.Tensor, dims: MlaDims, *, dtype: torch.dtype) -> LatentWeights:
    """Convert to `dtype`."""
    return HeadWeights(weight_HOL.to(dtype).contiguous(), dims.nope_dim)


def plan_mla(metadata: AttentionMetadata, dims: MlaDims) -> PagedMla:
    """The plan of one step."""
    return PagedMla(metadata, dims)


def _runs(metadata: AttentionMetadata, dims: MlaDims) -> list[_Run]:
    """Short rows are no run with longer ones, whatever becomes of those: a run has tiles for all tokens of its longest
    row, so that few programs would walk its short ones."""
    starts, lengths = metadata.query_start_cpu, metadata.context_len_cpu
    counts = [end - start for start, end in zip(starts, starts[1:])]
    kinds = [(count <= MAX_SHORT_QUERIES, _is_expanded(count, n, dims)) for count, n in zip(counts, lengths)]
    runs = []
    first = 0
    for row in range(1, len(kinds) + 1):
        if row == len(kinds) or kinds[row] != kinds[first]:
            runs.append(_Run(slice(first, row), slice(starts[first], starts[row]), kinds[first][1]))
            first = row
    return runs


def _is_expanded(num_queries: int, context_len: int, dims: MlaDims) -> bool:
    """Whether expanding takes fewer products, of a row that has enough queries."""
    if num_queries <= MAX_SHORT_QUERIES:
        return False
    per_token = dims.latent_dim * (dims.nope_dim + dims.value_dim)
    pairs = num_queries * context_len
    expanded = context_len * per_token + pairs * (dims.nope_dim + dims.rope_dim + dims.value_dim)
    return expanded < num_queries * per_token + pairs * (2 * dims.latent_dim + dims.rope_dim)


def _longest(starts: Sequence[int]) -> int:
    return max(end - start for start, end in zip(starts, starts[1:]))
