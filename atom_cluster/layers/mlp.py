"""The gated MLP of a decoder layer, its intermediate dims split over the ranks. Knows no models."""

from __future__ import annotations

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.linear import ColumnLinear, Outputs, RowLinear
from atom_cluster.parallel.sharding import WeightPart, even_span


class GatedMlp:
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, context: LayerContext, *, hidden_size: int, intermediate_size: int, has_bias: bool) -> None:
        span = even_span(intermediate_size, context.groups.tensor, what="MLP dims (intermediate_size)")
        outputs = Outputs(intermediate_size, span)
        self.gate_up = ColumnLinear(context, num_in=hidden_size, outputs=(outputs, outputs), has_bias=has_bias)
        self.down = RowLinear(context, full_in=intermediate_size, in_span=span, num_out=hidden_size, has_bias=has_bias)
        self._ops = context.ops

    def weight_parts(self, name: str) -> dict[str, WeightPart]:
        """Where the checkpoint's tensors go, by their names."""
        return {
            **self.gate_up.weight_parts((f"{name}.gate_proj", f"{name}.up_proj")),
            **self.down.weight_parts(f"{name}.down_proj"),
        }

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend."""
        self.gate_up.finish_loading()
        self.down.finish_loading()

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]"""
        return self.down(self._ops.silu_and_mul(self.gate_up(x_TD)))
