"""Reference experts with quantized weights: each is a pair of reference products with quantized weights."""

from __future__ import annotations

import torch

from atom_cluster.ops.moe import ExpertActivation, ExpertsOp
from atom_cluster.ops.quantized import QuantizedWeight
from atom_cluster.ops.torch_ref.moe import activate
from atom_cluster.ops.torch_ref.quantized import QuantizedLinear


class QuantizedExperts:
    """Expert by expert, its tokens gathered."""

    def __init__(
        self,
        gate_up: QuantizedWeight,
        down: QuantizedWeight,
        biases: tuple[torch.Tensor | None, torch.Tensor | None],
        activation: ExpertActivation,
        dtype: torch.dtype,
    ) -> None:
        self.name = f"{down.name} x {len(down.codes)} experts"
        self._experts = [
            tuple(
                QuantizedLinear(weight.expert(index), None if bias is None else bias[index], dtype)
                for weight, bias in zip((gate_up, down), biases)
            )
            for index in range(len(down.codes))
        ]
        self._activation = activation

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
        if x_TD.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.every_expert(x_TD, expert_TK, weight_TK, total_TD)
        for expert in sorted(set(expert_TK.flatten().tolist()) - {len(self._experts)}):
            token_N, choice_N = torch.where(expert_TK == expert)
            gate_up, down = self._experts[expert]
            out_ND = down(activate(gate_up(x_TD[token_N]), self._activation))
            total_TD.index_add_(0, token_N, out_ND.to(wide) * weight_TK[token_N, choice_N, None].to(wide))
        return total_TD.to(x_TD.dtype)

    def every_expert(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, total_TD: torch.Tensor
    ) -> torch.Tensor:
        """The same, for graphs: who has tokens is not known, so each expert gets all, most of which count nothing."""
        for index, (gate_up, down) in enumerate(self._experts):
            share_T1 = weight_TK.to(total_TD.dtype).masked_fill(expert_TK != index, 0).sum(1, keepdim=True)
            out_TD = down(activate(gate_up(x_TD), self._activation))
            total_TD.add_(out_TD.to(total_TD.dtype) * share_T1)
        return total_TD.to(x_TD.dtype)


def prepare_quantized_experts(
    gate_up: QuantizedWeight,
    down: QuantizedWeight,
    *,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: ExpertActivation,
    dtype: torch.dtype,
) -> ExpertsOp:
    """The weights as they are."""
    return QuantizedExperts(gate_up, down, (gate_up_bias, down_bias), activation, dtype)
