"""The router of a mixture of experts, replicated on every rank; its logits are float32. Knows no experts and no models.

Shape suffixes: T tokens, D hidden dims, E experts over all ranks, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.linear import ColumnLinear, Output
from atom_cluster.layers.module import Module
from atom_cluster.ops.moe import RoutingRule
from atom_cluster.parallel.sharding import WeightParts, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec(RoutingRule):
    """The rule, and which tensors the router has."""

    gate_name: str = "gate"
    """Of the projection from hidden dims to logits."""
    has_logit_bias: bool = False
    """The projection has a bias."""
    bias_name: str | None = None
    """Of the tensor [E] that counts for the choice of experts alone; None: there is none."""
    table_name: str | None = None
    """Of an int64 tensor [vocabulary, K] that says the experts of each token id; None: they are chosen by scores."""
    vocab_size: int = 0
    """Rows of that table."""


class Router(Module):
    """Chooses each token's experts. Its tensors are named behind those of the block it is in."""

    def __init__(self, context: LayerContext, spec: RouterSpec, *, hidden_size: int, num_experts: int) -> None:
        # Which experts are best is decided by small differences, which half precision would blur.
        self._dtype = torch.promote_types(context.dtype, torch.float32)
        gate_context = replace(context.unquantized, dtype=self._dtype)
        if gate_context.storage_dtype([f"{spec.gate_name}.weight"]) == context.dtype:
            # Products of the weights as they are stored, added up in float32, lose nothing either.
            prepare = partial(context.ops.prepare_linear, out_dtype=self._dtype)
            gate_context = replace(context.unquantized, ops=replace(context.ops, prepare_linear=prepare))
        self._gate_dtype = gate_context.dtype
        self.gate = ColumnLinear(
            gate_context,
            num_in=hidden_size,
            outputs=[Output(spec.gate_name, num_experts)],
            has_bias=spec.has_logit_bias,
        )
        self._bias_E: torch.Tensor | None = None
        self._own_parts: dict[str, WeightParts] = {}
        if spec.bias_name is not None:
            self._bias_E = torch.empty(num_experts, dtype=self._dtype, device=context.device)
            self._own_parts[context.full_name(spec.bias_name)] = whole(self._bias_E)
        self._expert_VK: torch.Tensor | None = None
        if spec.table_name is not None:
            shape = (spec.vocab_size, spec.experts_per_token)
            self._expert_VK = torch.empty(shape, dtype=torch.int64, device=context.device)
            self._own_parts[context.full_name(spec.table_name)] = whole(self._expert_VK)
        self._spec = spec
        self.experts_per_token = spec.experts_per_token
        self._ops = context.ops

    def weight_parts(self) -> Mapping[str, WeightParts]:
        """Where the checkpoint's tensors go, by their full names."""
        return {**super().weight_parts(), **self._own_parts}

    def __call__(
        self, x_TD: torch.Tensor, token_ids_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, D], [T] int64 -> (expert_TK int64, weight_TK float32). Token ids are needed by a router with a table."""
        chosen_TK: torch.Tensor | None = None
        if self._expert_VK is not None:
            if token_ids_T is None:
                raise AssertionError("a router with a table of experts was not given token ids")
            chosen_TK = self._expert_VK.index_select(0, token_ids_T)
        return self._ops.route(self.gate(x_TD.to(self._gate_dtype)), self._bias_E, self._spec, expert_TK=chosen_TK)
