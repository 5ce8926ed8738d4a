"""LinearScheme: how a linear layer's weights are stored, loaded and applied. Knows no layers and no checkpoints."""

from __future__ import annotations

from typing import Protocol

import torch

from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.table import OpTable


class LinearScheme(Protocol):
    """One quantization format. Stateless: layers own the tensors."""

    @property
    def name(self) -> str:
        """Name in logs and fingerprints."""
        ...

    def create_tensors(
        self, num_out: int, num_in: int, *, dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Uninitialised tensors of a [num_out, num_in] weight, by the suffix they have in checkpoints (`weight`).

        Each has the shape of the weight, so that a layer can shard it without knowing the format.
        """
        ...

    def prepare(
        self, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None, *, ops: OpTable, dtype: torch.dtype
    ) -> LinearOp:
        """The op that applies loaded tensors to inputs of `dtype`. The caller drops its references afterwards."""
        ...
