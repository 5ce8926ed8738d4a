"""Contract of multi-head latent attention (MLA) over paged latents. Knows no layers, no models and no block managers.

A token's keys and values, of all heads, are projections of one small vector, its latent c; beside it each token has one
key r that carries its position and is shared by the heads. The cache holds (c, r). Head h of query (q, p) computes

    score = q . (W_K[h] c) + p . r        output = sum of softmax(scores) * (W_V[h] c)

which is the same in two forms. Expanded: make keys and values of the latents, then attend as usual; cheap per query.
Absorbed: since q . (W_K c) = (W_K^T q) . c, attend to the latents themselves with one key/value head, and project the
mixture of latents; cheap per cached token. A backend chooses by row.

Shape suffixes: T tokens of the step, C cached tokens, H heads of this rank, L latent dims, P dims of the positional
key, S = L + P stored dims, N dims of q per head, V value dims per head, K positions selected per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache, Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaDims:
    """Sizes on this rank."""

    num_heads: int
    latent_dim: int
    nope_dim: int
    """Of q, the part of a query head that carries no position."""
    rope_dim: int
    """Of p and r, which do."""
    value_dim: int

    @property
    def max_absorbed_queries(self) -> int | None:
        """Queries of a row up to which the absorbed form takes fewer products; None: always.

        Per head, expanding costs L (N + V) products per cached token, and absorbing 2 L - N - V more per pair of query
        and cached token.
        """
        expanded = self.nope_dim + self.value_dim
        saved = 2 * self.latent_dim - expanded
        return self.latent_dim * expanded // saved if saved > 0 else None


@dataclass(frozen=True, slots=True)
class LatentNorm:
    """The RMS norm of latents; see `ops.norm` for what is rounded when."""

    weight_L: torch.Tensor
    eps: float


class LatentWeights(Protocol):
    """W_K and W_V of one layer, prepared for one backend. Results have the dtype they were prepared for."""

    def absorb(self, query_THN: torch.Tensor) -> torch.Tensor:
        """W_K^T q of each head, [T, H, L]."""
        ...

    def expand(self, latent_CL: torch.Tensor, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """(W_K c, W_V c) of these heads: [C, heads, N] and [C, heads, V]."""
        ...

    def project_values(self, mixed_THL: torch.Tensor) -> torch.Tensor:
        """W_V of each head times its mixture of latents, [T, H, V]."""
        ...


class PrepareLatentWeights(Protocol):
    """Makes LatentWeights of a loaded weight. Callers drop their reference."""

    def __call__(self, weight_HOL: torch.Tensor, dims: MlaDims, *, dtype: torch.dtype) -> LatentWeights:
        """weight_HOL: [H, N + V, L] in any float dtype, of each head W_K and then W_V; for inputs of `dtype`."""
        ...


class MlaPlan(Protocol):
    """Latent attention of one step, prepared once and used by every layer. Holds no reference to KV memory."""

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
        """Norm the latents, rotate positional keys and queries, and write what is cached to its slots.

        Latents and keys lie side by side: `kv.key` [N, block_size, 1, S]. All P dims are rotated, paired as
        `ops.rotary` says. Returns the rotated queries, [T, H, P]. The tensors may be strided views, as they come out of
        a projection; they may be overwritten. As for `AttentionPlan.store`, graphs may outlive the step.
        """
        ...

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
        """Causal attention of the step's queries (q and p) over their rows' latents, which `store` has completed.

        Returns [T, H, V], contiguous, in the query's dtype. Scores are multiplied by `scale`; they and the softmax are
        computed in float32 or wider. query_THN may be a strided view. selected_TK: what `ops.sparse_index` selected; a
        token sees those positions of its row and nothing else. None: all up to its own.
        """
        ...


class PlanMla(Protocol):
    """Builds the plan of one step."""

    def __call__(self, metadata: AttentionMetadata, dims: MlaDims) -> MlaPlan:
        """Called once per forward pass; does what all layers share. `metadata` has no window."""
        ...
