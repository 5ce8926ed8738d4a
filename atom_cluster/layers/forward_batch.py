"""ForwardBatch: the tensors of one forward pass, built by the runner, read by layers, which keep no state.

Shape suffixes: T tokens of the step, R rows of the step, B blocks per row (padded), S sampled rows, N KV blocks.
All tensors are on the model's device; the `_cpu` tuples of `AttentionMetadata` are the same numbers for code that must
not wait for a device. The attention types are defined in `ops/attention.py`, below layers, and offered here too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atom_cluster.ops.attention import AttentionMetadata, KvLayerCache

__all__ = ["AttentionMetadata", "ForwardBatch", "KvLayerCache"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Inputs of one forward pass."""

    token_ids: torch.Tensor
    """[T] int64"""
    positions: torch.Tensor
    """[T] int64"""
    attention: AttentionMetadata
    kv: tuple[KvLayerCache, ...]
    """One per layer."""
    sample_index: torch.Tensor
    """[S] int64: indices into T of the tokens whose logits are needed, in row order."""
