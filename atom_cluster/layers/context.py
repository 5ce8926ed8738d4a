"""LayerContext: everything a layer may ask about its surroundings, given at construction. There is no other context."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.groups import ProcessGroups
from atom_cluster.quantization.scheme import LinearScheme
from atom_cluster.quantization.unquantized import UNQUANTIZED


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerContext:
    """What layers are built with. The caller keeps ownership of `groups` and closes them after the model."""

    ops: OpTable
    groups: ProcessGroups
    dtype: torch.dtype
    """Dtype of activations and KV."""
    device: torch.device
    scheme: LinearScheme = UNQUANTIZED
    """How linear layers store their weights."""
    weight_dtype: torch.dtype | None = None
    """Dtype that unquantized weights are loaded in; None: `dtype`. Narrower than `dtype` for a bfloat16 checkpoint
    computed in float32: embeddings stay that small, linear weights go through `ops.prepare_linear`."""

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype that weights are allocated in."""
        return self.dtype if self.weight_dtype is None else self.weight_dtype
