"""Weights of eight bits, float8 or int8, with a scale per tensor, per output or per block. One code per element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight
from atom_cluster.quantization.quantized import QuantizedScheme, blocks_of_parts, scale_per_row
from atom_cluster.quantization.scheme import LinearShape, StoredTensor
from atom_cluster.units import ceil_div

_DTYPES = {"float8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBit(QuantizedScheme):
    """`weight` [out, in] and a scale that its codes are multiplied by; `input_scale` for static input quantization."""

    number: Literal["float8", "int8"]
    granularity: Literal["tensor", "channel"] | tuple[int, int]
    """What shares a scale: a pair is a block of outputs and inputs."""
    inputs: InputQuantization | None
    scale_name: str = "weight_scale"
    has_flat_scale: bool = False
    """Scales per output are [out], and [out, 1] otherwise."""
    is_e8m0: bool = False
    """Scales are powers of two, stored as exponents."""

    @property
    def name(self) -> str:
        """Everything that tells it from others."""
        grain = self.granularity if isinstance(self.granularity, str) else "{}x{}".format(*self.granularity)
        return f"{self.number} per {grain}" + ("" if self.inputs is None else f" (inputs {self.inputs.name})")

    @property
    def mark(self) -> str:
        """Its scale."""
        return self.scale_name

    def create_tensors(
        self, shape: LinearShape, *, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, StoredTensor]:
        """Codes and scales."""
        codes = torch.empty(*shape.stack, shape.num_out, shape.num_in, dtype=_DTYPES[self.number], device=device)
        tensors = {
            "weight": StoredTensor(tensor=codes, out_axis=0, in_axis=1),
            self.scale_name: self._create_scale(shape, device),
        }
        if self.inputs is not None and self.inputs.is_static:
            scale = torch.empty(*shape.stack, len(shape.part_sizes), dtype=torch.float32, device=device)
            tensors["input_scale"] = StoredTensor(tensor=scale, out_axis=None, in_axis=None)
        return tensors

    def _create_scale(self, shape: LinearShape, device: torch.device) -> StoredTensor:
        def empty(*sizes: int) -> torch.Tensor:
            dtype = torch.uint8 if self.is_e8m0 else torch.float32
            return torch.empty(*shape.stack, *sizes, dtype=dtype, device=device)

        if self.granularity == "tensor":
            return StoredTensor(tensor=empty(len(shape.part_sizes)), out_axis=None, in_axis=None)
        if self.granularity == "channel":
            scale = empty(shape.num_out) if self.has_flat_scale else empty(shape.num_out, 1)
            return StoredTensor(tensor=scale, out_axis=0, in_axis=None)
        rows, columns = self.granularity
        num_rows = sum(ceil_div(size, rows) for size in shape.part_sizes)
        scale = empty(num_rows, ceil_div(shape.num_in, columns))
        return StoredTensor(tensor=scale, out_axis=0, in_axis=1, out_unit=rows, in_unit=columns)

    def to_weight(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape) -> QuantizedWeight:
        """The tensors as they are; of several projections' input scales the largest, which fits all."""
        scale = tensors[self.scale_name]
        if self.granularity == "tensor":
            scale, block = scale_per_row(scale, shape)
        elif self.granularity == "channel":
            scale = scale[..., None] if self.has_flat_scale else scale
            block = (1, shape.num_in)
        else:
            scale, block = blocks_of_parts(scale, self.granularity, shape)
        input_scale = tensors.get("input_scale")
        return QuantizedWeight(
            number=self.number,
            codes=tensors["weight"],
            scale=scale,
            block=block,
            inputs=self.inputs,
            input_scale=None if input_scale is None else input_scale.amax(-1),
        )
