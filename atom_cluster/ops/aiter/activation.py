"""Gated activations by AITER. Knows no layers."""

from __future__ import annotations

import torch

from atom_cluster.ops.activation import GateAndMul
from atom_cluster.ops.aiter.binding import HALF_DTYPES, AiterFunction

SILU = AiterFunction("aiter.ops.activation", "silu_and_mul", "out", "input")
GELU_TANH = AiterFunction("aiter.ops.activation", "gelu_tanh_and_mul", "out", "input")
FUNCTIONS = (SILU, GELU_TANH)


def gate_op(function: AiterFunction, fallback: GateAndMul) -> GateAndMul:
    """An activation of contiguous rows of half precision; others, and clamped ones, are left to `fallback`."""

    def gate_and_mul(gate_up: torch.Tensor, limit: float | None = None) -> torch.Tensor:
        is_plain = gate_up.dtype in HALF_DTYPES and gate_up.is_contiguous() and gate_up.numel() > 0
        if limit is not None or not is_plain:
            return fallback(gate_up, limit)
        rows = gate_up.view(-1, gate_up.shape[-1])
        out = rows.new_empty(len(rows), rows.shape[-1] // 2)
        function(out=out, input=rows)
        return out.view(*gate_up.shape[:-1], -1)

    return gate_and_mul
