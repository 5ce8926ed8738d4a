"""What the runner needs from a model: sizes to allocate memory by, and the two halves of a forward pass."""

from __future__ import annotations

from typing import Protocol

import torch

from atom_cluster.kv_cache.layout import KvLayout
from atom_cluster.layers.forward_batch import ForwardBatch, LayerInputs
from atom_cluster.layers.logits import Logits


class CausalLM(Protocol):
    """A decoder-only language model on one rank, weights loaded. Calls are made under `torch.inference_mode`."""

    kv_layout: KvLayout
    """What this rank's layers keep between steps, layers for drafting included."""

    @property
    def vocab_size(self) -> int:
        """Size of the full vocabulary, over all ranks."""
        ...

    @property
    def num_draft_layers(self) -> int:
        """Layers that can draft tokens; 0: none."""
        ...

    def forward(self, batch: ForwardBatch, inputs: LayerInputs | None = None) -> torch.Tensor:
        """Hidden states after the final norm, [T, D]; writes what the step leaves behind into `batch.caches`.

        inputs: how layers are to see the batch; None: as it is.
        """
        ...

    def compute_logits(self, hidden_SD: torch.Tensor) -> Logits:
        """Logits of S samples."""
        ...

    def forward_draft(
        self, index: int, next_token_ids_T: torch.Tensor, hidden_TD: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor:
        """The drafting layer `index` over a step's tokens: hidden states for `compute_draft_logits`, [T, D].

        next_token_ids_T: the token behind each of the batch's tokens (for layer i, the one i + 1 behind);
        hidden_TD: what `forward`, or the drafting layer before, returned for them. Writes the layer's own cache.
        """
        ...

    def compute_draft_logits(self, index: int, hidden_SD: torch.Tensor) -> Logits:
        """Logits of S drafted tokens."""
        ...
