"""Reference products with quantized weights: inputs rounded, weights turned into floats a tile of outputs at a time.

Sums are computed in float32 or wider from the numbers that codes and scales stand for, which is what kernels that
multiply codes get, up to the order of the sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertActivation, ExpertsOp
from atom_cluster.ops.number_formats import largest, rounded, scale_for
from atom_cluster.ops.quantized import QuantizedWeight, dequantize
from atom_cluster.ops.torch_ref.moe import activate

TILE_ELEMENTS = 1 << 22
"""Of a weight that are floats at a time."""


class QuantizedLinear:
    """`round(x) @ weight.T + bias`, the weight kept as it is stored."""

    def __init__(self, weight: QuantizedWeight, bias_O: torch.Tensor | None, dtype: torch.dtype) -> None:
        self._weight = weight
        self._bias_O = bias_O
        self._wide = torch.promote_types(dtype, torch.float32)
        self._tile = max(1, TILE_ELEMENTS // weight.num_in)

    @property
    def name(self) -> str:
        """Numbers and scales."""
        return self._weight.name

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out]"""
        weight = self._weight
        x = round_inputs(x_TI.to(self._wide), weight)
        y = x.new_empty(len(x), weight.num_out)
        for start in range(0, weight.num_out, self._tile):
            rows = slice(start, min(start + self._tile, weight.num_out))
            torch.matmul(x, dequantize(weight, self._wide, rows).T, out=y[:, rows])
        if self._bias_O is not None:
            y += self._bias_O
        return y.to(x_TI.dtype)


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

    def __call__(self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]"""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        total_TD = torch.zeros_like(x_TD, dtype=wide)
        for expert in sorted(set(expert_TK.flatten().tolist()) - {len(self._experts)}):
            token_N, choice_N = torch.where(expert_TK == expert)
            gate_up, down = self._experts[expert]
            out_ND = down(activate(gate_up(x_TD[token_N]), self._activation))
            total_TD.index_add_(0, token_N, out_ND.to(wide) * weight_TK[token_N, choice_N, None].to(wide))
        return total_TD.to(x_TD.dtype)


def prepare_quantized_linear(weight: QuantizedWeight, bias_O: torch.Tensor | None, *, dtype: torch.dtype) -> LinearOp:
    """The weight as it is."""
    return QuantizedLinear(weight, bias_O, dtype)


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


def round_inputs(x_TI: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """Inputs, float32 or wider, rounded as the weight wants them: codes times scale. [T, I]"""
    spec = weight.inputs
    if spec is None:
        return x_TI
    float8_dtype = weight.codes.dtype if weight.number == "float8" else torch.float8_e4m3fn
    if spec.is_static:
        assert weight.input_scale is not None, "static input quantization without a scale"
        scale = weight.input_scale.to(x_TI.dtype)
        return rounded(x_TI / scale, spec.number, float8_dtype) * scale
    num_in = x_TI.shape[-1]
    group_size = num_in if spec.group_size is None else spec.group_size
    groups = F.pad(x_TI, (0, -num_in % group_size)).reshape(len(x_TI), -1, group_size)
    max_abs = groups.abs().amax(dim=-1, keepdim=True)
    if spec.max_abs is not None:
        max_abs = max_abs.clamp(max=spec.max_abs)
    scale = scale_for(max_abs, largest(spec.number, float8_dtype), spec.scale_format)
    return (rounded(groups / scale, spec.number, float8_dtype) * scale).flatten(-2)[:, :num_in]
