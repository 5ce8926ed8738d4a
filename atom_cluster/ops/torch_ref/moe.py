"""Reference experts: expert by expert, its tokens gathered."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atom_cluster.ops.moe import ExpertActivation, ExpertsOp


class PlainExperts:
    """Weights in the dtype of the activations."""

    def __init__(
        self,
        gate_up_EOD: torch.Tensor,
        down_EDI: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        activation: ExpertActivation,
    ) -> None:
        self._gate_up_EOD, self._gate_up_bias_EO = gate_up_EOD, gate_up_bias
        self._down_EDI, self._down_bias_ED = down_EDI, down_bias
        self._activation = activation

    @property
    def name(self) -> str:
        """Their dtype, and how many."""
        return f"{str(self._down_EDI.dtype).removeprefix('torch.')} x {len(self._down_EDI)} experts"

    def __call__(
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        *,
        addend_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, D] -> [T, D]"""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        total_TD = torch.zeros_like(x_TD, dtype=wide) if addend_TD is None else addend_TD.to(wide, copy=True)
        for expert in sorted(set(expert_TK.flatten().tolist())):
            if expert == len(self._down_EDI):
                continue
            token_N, choice_N = torch.where(expert_TK == expert)
            hidden = F.linear(x_TD[token_N], self._gate_up_EOD[expert], _row(self._gate_up_bias_EO, expert))
            hidden = activate(hidden, self._activation)
            out_ND = F.linear(hidden, self._down_EDI[expert], _row(self._down_bias_ED, expert))
            total_TD.index_add_(0, token_N, out_ND.to(wide) * weight_TK[token_N, choice_N, None].to(wide))
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
    """Convert to `dtype`."""
    biases = [None if bias is None else bias.to(dtype) for bias in (gate_up_bias, down_bias)]
    return PlainExperts(gate_up_EOD.to(dtype), down_EDI.to(dtype), biases[0], biases[1], activation)


def activate(gate_up: torch.Tensor, activation: ExpertActivation) -> torch.Tensor:
    """[..., 2 I], gate first -> [..., I]"""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    if activation.kind == "silu":
        return F.silu(gate) * up
    return (up + 1) * gate * torch.sigmoid(gate * activation.alpha)


def _row(bias: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if bias is None else bias[expert]
