"""Experts for CPUs: tokens sorted by expert once, then two products per expert in use, on weights packed like others'.

Shape suffixes: T tokens, D hidden dims, E experts, I intermediate dims, K experts per token, N pairs of a token and an
expert that is on this rank.
"""

from __future__ import annotations

import torch

from atom_cluster.ops.cpu.linear import prepare_linear
from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertActivation, ExpertsOp
from atom_cluster.ops.torch_ref.moe import activate


class CpuExperts:
    """One pair of linear ops per expert, so that each may be packed."""

    def __init__(self, experts: list[tuple[LinearOp, LinearOp]], activation: ExpertActivation) -> None:
        self._experts = experts
        self._activation = activation

    @property
    def name(self) -> str:
        """What became of their weights, and how many there are."""
        kinds = sorted({op.name for expert in self._experts for op in expert})
        return f"{' and '.join(kinds)} x {len(self._experts)} experts"

    def __call__(
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        *,
        addend_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, D] -> [T, D]"""
        num_experts, num_chosen = len(self._experts), expert_TK.shape[1]
        counts = torch.bincount(expert_TK.flatten(), minlength=num_experts + 1)[:num_experts].tolist()
        pair_N = expert_TK.flatten().argsort()[: sum(counts)]
        token_N = pair_N // num_chosen
        x_ND = x_TD.index_select(0, token_N)
        outputs, start = [], 0
        for (gate_up, down), count in zip(self._experts, counts):
            if count:
                hidden = activate(gate_up(x_ND[start : start + count]), self._activation)
                outputs.append(down(hidden))
                start += count
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        total_TD = torch.zeros_like(x_TD, dtype=wide) if addend_TD is None else addend_TD.to(wide, copy=True)
        if outputs:
            weighted_ND = torch.cat(outputs).to(wide) * weight_TK.flatten()[pair_N, None].to(wide)
            total_TD.index_add_(0, token_N, weighted_ND)
        return total_TD.to(x_TD.dtype)


def prepare_experts(
    gate_up_EOD: torch.Tensor,
    down_EDI: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: ExpertActivation,
    dtype: torch.dtype,
) -> ExpertsOp:
    """Each expert like a linear layer."""
    experts = []
    for expert, (gate_up_OD, down_DI) in enumerate(zip(gate_up_EOD, down_EDI)):
        gate_up_O = None if gate_up_bias is None else gate_up_bias[expert]
        down_D = None if down_bias is None else down_bias[expert]
        experts.append(
            (prepare_linear(gate_up_OD, gate_up_O, dtype=dtype), prepare_linear(down_DI, down_D, dtype=dtype))
        )
    return CpuExperts(experts, activation)
