"""Reference products with quantized weights: inputs rounded, weights turned into floats a tile of outputs at a time.

Sums are computed in float32 or wider from the numbers that codes and scales stand for, which is what kernels that
multiply codes get, up to the order of the sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.number_formats import largest, rounded, scale_for
from atom_cluster.ops.quantized import QuantizedWeight, dequantize

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


def prepare_quantized_linear(weight: QuantizedWeight, bias_O: torch.Tensor | None, *, dtype: torch.dtype) -> LinearOp:
    """The weight as it is."""
    return QuantizedLinear(weight, bias_O, dtype)


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
