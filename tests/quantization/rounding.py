"""A plan whose layers multiply float weights with rounded inputs: what a model with quantized inputs should compute."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from atom_cluster.quantization.scheme import LinearShape
from atom_cluster.quantization.unquantized import Unquantized
from tests.quantization.formats import RoundInputs


class RoundingLinear:
    name = "rounding"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, round_inputs: RoundInputs) -> None:
        self._weight, self._bias, self._round_inputs = weight, bias, round_inputs

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self._round_inputs(x), self._weight, self._bias)


class RoundingExperts:
    """SwiGLU experts, token by token."""

    name = "rounding"

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, round_inputs: RoundInputs) -> None:
        self._gate_up, self._down, self._round_inputs = gate_up, down, round_inputs

    def __call__(
        self,
        x: torch.Tensor,
        expert: torch.Tensor,
        weight: torch.Tensor,
        *,
        addend_TD: torch.Tensor | None = None,  # noqa: N803 - the contract's name
    ) -> torch.Tensor:
        total = torch.zeros_like(x) if addend_TD is None else addend_TD.clone()
        for token, row in enumerate(x):
            for index, share in zip(expert[token].tolist(), weight[token]):
                gate, up = (self._gate_up[index] @ self._round_inputs(row[None])[0]).chunk(2)
                hidden = F.silu(gate) * up
                total[token] += share * (self._down[index] @ self._round_inputs(hidden[None])[0])
        return total


class RoundingPlan(Unquantized):
    """Plan and scheme in one, for float64. `round_inputs` None: plain products."""

    ignored: tuple[str, ...] = ()

    def __init__(self, round_inputs: RoundInputs | None) -> None:
        self._round_inputs = round_inputs or (lambda x: x)

    def linear(self, name: str) -> RoundingPlan:
        return self  # routers and heads do not ask

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, *, shape: LinearShape, **_: object
    ) -> RoundingLinear:
        return RoundingLinear(tensors["weight"], bias, self._round_inputs)

    def prepare_experts(
        self, gate_up: Mapping[str, torch.Tensor], down: Mapping[str, torch.Tensor], **_: object
    ) -> RoundingExperts:
        return RoundingExperts(gate_up["weight"], down["weight"], self._round_inputs)
