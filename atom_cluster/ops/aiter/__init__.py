"""Ops by AITER, AMD's kernels for Instinct: thin, each with a backend behind it for what AITER has no kernel for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from atom_cluster.config.ops import OpFamily
from atom_cluster.ops.aiter import (
    activation,
    attention,
    experts,
    linear,
    mla,
    norm,
    quantized_linear,
    routing,
)
from atom_cluster.ops.aiter.binding import HALF_DTYPES, AiterFunction, aiter_version, why_not, why_not_imported
from atom_cluster.ops.table import OpTable

__all__ = ["FAMILIES", "AiterFamily", "AiterFunction", "aiter_version", "why_not", "why_not_at_all"]


@dataclass(frozen=True, slots=True)
class AiterFamily:
    """Ops that come together."""

    functions: Sequence[AiterFunction]
    """What they call."""
    ops: Callable[[OpTable, bool], Mapping[str, Any]]
    """(ops behind these, whether the chip multiplies four-bit numbers) -> ops by their field of the table."""
    float4_functions: Sequence[AiterFunction] = ()
    """What they call beside that for four-bit weights; those are left to the ops behind where one is missing."""


FAMILIES: Mapping[OpFamily, AiterFamily] = {
    "linear": AiterFamily(
        linear.FUNCTIONS, lambda behind, _: {"prepare_linear": linear.linear_preparer(behind.prepare_linear)}
    ),
    "quantized_linear": AiterFamily(
        quantized_linear.FUNCTIONS,
        lambda behind, has_float4: {
            "prepare_quantized_linear": quantized_linear.quantized_linear_preparer(
                behind.prepare_quantized_linear, float8_dtype=behind.float8_dtype, has_float4=has_float4
            )
        },
        quantized_linear.FLOAT4_FUNCTIONS,
    ),
    "experts": AiterFamily(
        experts.FUNCTIONS, lambda behind, _: {"prepare_experts": experts.experts_preparer(behind.prepare_experts)}
    ),
    "quantized_experts": AiterFamily(
        experts.FUNCTIONS,
        lambda behind, has_float4: {
            "prepare_quantized_experts": experts.quantized_experts_preparer(
                behind.prepare_quantized_experts, float8_dtype=behind.float8_dtype, has_float4=has_float4
            )
        },
        experts.FLOAT4_FUNCTIONS,
    ),
    "routing": AiterFamily(routing.FUNCTIONS, lambda behind, _: {"route": routing.route_op(behind.route)}),
    "norm": AiterFamily(
        norm.FUNCTIONS,
        lambda behind, _: {
            "rms_norm": norm.rms_norm_op(behind.rms_norm),
            "add_rms_norm": norm.add_rms_norm_op(behind.add_rms_norm),
        },
    ),
    "activation": AiterFamily(
        activation.FUNCTIONS,
        lambda behind, _: {
            "silu_and_mul": activation.gate_op(activation.SILU, behind.silu_and_mul),
            "gelu_tanh_and_mul": activation.gate_op(activation.GELU_TANH, behind.gelu_tanh_and_mul),
        },
    ),
    "attention": AiterFamily(
        attention.FUNCTIONS, lambda behind, _: {"plan_attention": attention.attention_planner(behind.plan_attention)}
    ),
    "mla": AiterFamily(mla.FUNCTIONS, lambda behind, _: {"plan_mla": mla.mla_planner(behind.plan_mla)}),
}
"""Families with ops by AITER. Not here: rotary, as AITER takes angles in the dtype of the heads only, ours are
float32, and attention rotates while it stores anyway; whatever has no kernel in AITER for our contracts."""


def why_not_at_all(dtype: torch.dtype) -> str | None:
    """Why AITER is of no use for activations of this dtype here; None: it may be."""
    if dtype not in HALF_DTYPES:
        return f"aiter computes in half precision, not in {str(dtype).removeprefix('torch.')}"
    return why_not_imported()
