"""How products of experts are cut up: by kind of weight, rows per tile and chip. Knows no tensors' values.

Measured choices are in `tuning/moe.<arch>.json`; other chips have those below, which fit the memory of all.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from atom_cluster.ops.triton import runtime
from atom_cluster.ops.triton.moe_gemm import GemmConfig
from atom_cluster.ops.triton.moe_gemv import GemvConfig
from atom_cluster.ops.triton.moe_weights import ExpertMatrix

Kind = Literal["float", "codes", "packed"]
"""Weights in floats; codes that are multiplied by codes; codes that become floats in registers."""

_MOST_PAIRS_UNSORTED = 16
_EXPERTS_PER_UNSORTED_PAIR = 8
_FEWEST_PAIRS_FOR_HOPPER = 256
"""With so many, spread evenly over DeepSeek's experts, it takes 3 % less time than `moe_gemm`."""


def is_unsorted(num_tokens: int, num_pairs: int, num_experts: int) -> bool:
    """Whether so few pairs have hardly any expert in common that each may read its expert's weights."""
    return num_tokens == 1 or (
        num_pairs <= _MOST_PAIRS_UNSORTED and num_pairs * _EXPERTS_PER_UNSORTED_PAIR <= num_experts
    )


def is_for_hopper(num_pairs: int) -> bool:
    """Whether `moe_gemm_hopper` is as fast with so many as other kernels are, wherever it can be used."""
    return num_pairs >= _FEWEST_PAIRS_FOR_HOPPER


def rows_per_tile(num_pairs: int, num_experts: int) -> int:
    """Enough for most experts' pairs, were they chosen evenly, to be one tile."""
    return min(128, max(16, triton.next_power_of_2(num_pairs * 3 // (2 * num_experts))))


def gemv(*, is_gated: bool) -> GemvConfig:
    """For pairs that are not sorted, with weights in floats."""
    found = _measured(runtime.arch()).get("gemv", {}).get(_part(is_gated=is_gated), (8, 512, 4))
    return GemvConfig(*found)


def gemm(
    matrix: ExpertMatrix, kind: Kind, dtype: torch.dtype, rows: int, largest_step: int, *, is_gated: bool
) -> GemmConfig:
    """For tiles of so many rows; 1: of pairs that are not sorted."""
    if dtype == torch.float32:
        return GemmConfig(32, min(32, largest_step), 1, 4, 2)
    measured = _measured(runtime.arch()).get("gemm", {}).get(f"{kind} {_part(is_gated=is_gated)}", {}).get(str(rows))
    if measured is not None:
        block_out, block_in, *others = measured
    elif rows < 64:
        block_out, block_in, others = 64, 128, [1, 4, 2]
    else:
        block_out, block_in, others = 128 if is_gated or kind != "float" else 256, 64, [8, 8, 2]
    if kind != "packed" and matrix.num_in % 128 and matrix.num_in % 64 == 0:
        block_in = min(block_in, 64)
    if kind == "packed" and matrix.group == 64:
        # So that sums can be scaled in place of weights.
        block_in = min(block_in, 64)
    return GemmConfig(block_out, min(block_in, largest_step), *others)


def _part(*, is_gated: bool) -> str:
    return "gated" if is_gated else "down"


@cache
def _measured(arch: str) -> dict[str, Any]:
    path = Path(__file__).parent / "tuning" / f"moe.{arch}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
