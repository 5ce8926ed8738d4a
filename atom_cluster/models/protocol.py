"""What the runner needs from a model: sizes to allocate KV memory by, and the two halves of a forward pass."""

from __future__ import annotations

from typing import Protocol

import torch

from atom_cluster.kv_cache.layout import KvLayout
from atom_cluster.layers.forward_batch import ForwardBatch


class CausalLM(Protocol):
    """A decoder-only language model on one rank, weights loaded. Calls are made under `torch.inference_mode`."""

    @property
    def kv_layout(self) -> KvLayout:
        """KV sizes of this rank's layers."""
        ...

    @property
    def vocab_size(self) -> int:
        """Size of the full vocabulary, over all ranks."""
        ...

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states after the final norm, [T, D]; writes the step's KV into `batch.kv`."""
        ...

    def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor | None:
        """Logits over the full vocabulary, [S, V] float32; None on ranks other than 0 (they took part in gathering)."""
        ...
