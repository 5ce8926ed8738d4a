"""Attention over paged KV: the tensors that describe one step, and the contract of every backend's attention.

Knows no models, requests or block managers.

Shape suffixes: T tokens of the step, R rows of the step, B blocks per row (padded), H query heads, K key/value heads,
D head dim, N blocks of KV memory. `H % K == 0`: query head h reads key/value head `h // (H // K)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class KvLayerCache:
    """Paged KV of one layer: views into the runner's memory, strided over blocks."""

    key: torch.Tensor
    """[N, entries per page, num_kv_heads of this rank, head_dim]; of layers with an entry per token, block_size."""
    value: torch.Tensor
    """[N, entries per page, num_kv_heads of this rank, v_head_dim]; v_head_dim may be 0, or differ from head_dim."""
    key_scale: float = 1.0
    """What is stored is a key over this, in the memory's dtype: saturated in eight bits, rounded in any."""
    value_scale: float = 1.0
    """The same of values."""


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms over each head, as `ops.norm`; of queries and of keys."""

    query_D: torch.Tensor
    key_D: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """Angles of the step's tokens, as `ops.rotary` takes them; pairs are half the rotated dims apart."""

    cos_T1P: torch.Tensor
    sin_T1P: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """Which tokens belong to which row and where each row's KV lives. Rows with one query token come first.

    Layers that keep different spans of the past (all of it, or a window) have different blocks, and so each their own
    metadata; only `window`, `block_table` and `slot` differ between them.
    """

    block_size: int
    window: int | None = None
    """Positions that a token sees, its own included: p - window + 1 .. p. None: all, 0 .. p."""
    num_decode_rows: int
    """The first rows, each with exactly one query token (so the first `num_decode_rows` tokens are theirs)."""
    query_start: torch.Tensor
    """[R + 1] int32: tokens of row r are query_start[r]:query_start[r + 1]."""
    context_len: torch.Tensor
    """[R] int32: tokens of the row including this step's."""
    block_table: torch.Tensor
    """[R, B] int32: block ids; entries beyond a row's blocks, and those wholly behind the window of the row's first
    query, are arbitrary valid ids and not read."""
    slot: torch.Tensor
    """[T] int64: where each token's KV goes, block_id * block_size + offset."""
    query_start_cpu: tuple[int, ...]
    context_len_cpu: tuple[int, ...]
    """On CPUs exact; on other devices it may be more than the row has, by a few tokens of the last block or the next,
    where tokens are drafted and the host does not know how many were kept: `context_len` decides there."""


class AttentionPlan(Protocol):
    """Attention of one step, prepared once and used by every layer. Holds no reference to KV memory."""

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
        """Norm and rotate queries and keys, and write keys and values to their slots of one layer.

        Norms come first; what is None is left out. Returns the queries to attend with, [T, H, D]. The tensors may be
        strided views, as they come out of a projection, with heads whole; they may be overwritten. Values may have no
        dims: only keys are written then. Where steps can be captured, the metadata's `slot` is read at each call and
        each replay: graphs outlive a step.
        """
        ...

    def attend(
        self, query_THD: torch.Tensor, kv: KvLayerCache, *, scale: float, sink_H: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Causal attention of the step's queries over their rows' KV, as stored; `store` has already completed it.

        Returns [T, H, value dim], contiguous, in the query's dtype. The token at position p of a row sees positions
        0..p of that row, or the last `window` of them, and nothing else. Scores and softmax are computed in float32 or
        wider. sink_H: a logit per head that takes part in the softmax and has no value (attention sink).
        """
        ...


class PlanAttention(Protocol):
    """Builds the plan of one step."""

    def __call__(self, metadata: AttentionMetadata) -> AttentionPlan:
        """Called once per forward pass; does what all layers share, such as gather indices and masks."""
        ...
