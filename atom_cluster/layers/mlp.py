"""The gated MLP of a decoder layer, its intermediate dims split over the ranks. Knows no models."""

from __future__ import annotations

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.linear import ColumnLinear, Output, RowLinear
from atom_cluster.layers.module import Module
from atom_cluster.ops.activation import GateAndMul
from atom_cluster.ops.linear import LinearOp, gated_product
from atom_cluster.parallel.sharding import even_span


class GatedMlp(Module):
    """down(activation(gate(x)) * up(x))"""

    def __init__(
        self,
        context: LayerContext,
        *,
        hidden_size: int,
        intermediate_size: int,
        has_bias: bool = False,
        activation: GateAndMul | None = None,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        sums: bool = True,
    ) -> None:
        """activation: silu when None. names: of gate, up and down projection. sums: as for `RowLinear`."""
        span = even_span(intermediate_size, context.groups.tensor, what="MLP dims (intermediate_size)")
        outputs = [Output(name, intermediate_size, span) for name in names[:2]]
        self.gate_up = ColumnLinear(context, num_in=hidden_size, outputs=outputs, has_bias=has_bias)
        self.down = RowLinear(
            context.at(names[2]),
            full_in=intermediate_size,
            in_span=span,
            num_out=hidden_size,
            has_bias=has_bias,
            sums=sums,
        )
        self._activation = context.ops.silu_and_mul if activation is None else activation

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]"""
        return self.behind_first(gated_product(self.gate_up.op, x_TD, self._activation))

    @property
    def first(self) -> tuple[LinearOp, GateAndMul | None]:
        """The product that its inputs go into, and nothing else, and its activation."""
        return self.gate_up.op, self._activation

    @property
    def widest(self) -> int:
        """Gate, up, and what the activation makes of them."""
        return self.gate_up.widest * 3 // 2

    def behind_first(self, y_TI: torch.Tensor) -> torch.Tensor:
        """[T, intermediate dims of this rank] -> [T, D]"""
        return self.down(y_TI)
