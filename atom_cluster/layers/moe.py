"""Mixture of experts in place of a decoder layer's MLP: router, experts, shared expert. Knows no models.

Shape suffixes: T tokens, D hidden dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.experts import Experts, ExpertsSpec
from atom_cluster.layers.linear import ColumnLinear, Output
from atom_cluster.layers.mlp import GatedMlp
from atom_cluster.layers.module import Module
from atom_cluster.layers.router import Router, RouterSpec
from atom_cluster.parallel.collectives import all_reduce_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec(ExpertsSpec):
    """Sizes over all ranks, and names behind that of the block."""

    router: RouterSpec
    shared_size: int | None = None
    """Intermediate dims of the expert that every token goes through; None: there is none. Its projections have the
    names of the others', and its activation is silu with their limit."""
    shared_name: str = "shared_experts"
    shared_gate_name: str | None = None
    """Of a projection to one logit, whose sigmoid multiplies the shared expert's output."""


class SparseMoe(Module):
    """Sum of each token's experts, weighted by the router, and of the shared expert."""

    def __init__(self, context: LayerContext, spec: MoeSpec) -> None:
        self.router = Router(context, spec.router, hidden_size=spec.hidden_size, num_experts=spec.num_experts)
        self.experts = Experts(context, spec)
        self.shared: GatedMlp | None = None
        self.shared_gate: ColumnLinear | None = None
        if spec.shared_size is not None:
            silu, limit = context.ops.silu_and_mul, spec.activation.limit
            self.shared = GatedMlp(
                context.at(spec.shared_name),
                hidden_size=spec.hidden_size,
                intermediate_size=spec.shared_size,
                names=spec.projection_names,
                activation=silu if limit is None else partial(silu, limit=limit),
                sums=False,
            )
        if spec.shared_gate_name is not None:
            outputs = [Output(spec.shared_gate_name, 1)]
            self.shared_gate = ColumnLinear(context.unquantized, num_in=spec.hidden_size, outputs=outputs)
        self._group = context.groups.tensor
        self._ops = context.ops

    @property
    def widest(self) -> int:
        """All experts of a token on this rank, in the worst case; the shared expert comes before them."""
        shared = 0 if self.shared is None else self.shared.widest
        return max(shared, self.experts.widest * self.router.experts_per_token)

    def __call__(self, x_TD: torch.Tensor, token_ids_T: torch.Tensor | None = None) -> torch.Tensor:
        """[T, D], [T] int64 -> [T, D]. Token ids are needed if the router has a table."""
        shared_TD = None if self.shared is None else self.shared(x_TD)
        if shared_TD is not None and self.shared_gate is not None:
            shared_TD = self._ops.sigmoid_and_mul(shared_TD, self.shared_gate(x_TD))
        y_TD = self.experts(x_TD, *self.router(x_TD, token_ids_T), addend_TD=shared_TD)
        return all_reduce_sum(y_TD, self._group)
