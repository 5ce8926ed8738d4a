"""Weights of four bits in OCP microscaling format (MXFP4): 32 inputs share a scale that is a power of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from atom_cluster.ops.quantized import InputQuantization, QuantizedWeight
from atom_cluster.quantization.blocks import local_groups
from atom_cluster.quantization.quantized import QuantizedScheme, check_packing
from atom_cluster.quantization.scheme import LinearShape, StoredTensor

GROUP_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4(QuantizedScheme):
    """Codes [out, in / 2], two to a byte, and scales [out, in / 32] as exponents, both bytes."""

    inputs: InputQuantization | None
    codes_name: str
    scale_name: str
    codes_dtype: torch.dtype = torch.uint8
    """As stored; of one byte."""
    is_grouped: bool = False
    """Codes are stored as [out, in / 32, 16]."""

    @property
    def name(self) -> str:
        """Everything that tells it from others."""
        return "mxfp4" if self.inputs is None else f"mxfp4 (inputs {self.inputs.name})"

    @property
    def mark(self) -> str:
        """Its scale."""
        return self.scale_name

    def create_tensors(
        self, shape: LinearShape, *, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, StoredTensor]:
        """Codes and scales."""
        check_packing(shape, in_unit=2, format_name="mxfp4")
        num_groups = shape.covering_in(GROUP_SIZE)
        columns = (num_groups, GROUP_SIZE // 2) if self.is_grouped else (shape.num_in // 2,)
        codes = torch.empty(*shape.stack, shape.num_out, *columns, dtype=self.codes_dtype, device=device)
        scale = torch.empty(*shape.stack, shape.num_out, num_groups, dtype=torch.uint8, device=device)
        codes_unit = GROUP_SIZE if self.is_grouped else 2
        return {
            self.codes_name: StoredTensor(tensor=codes, out_axis=0, in_axis=1, in_unit=codes_unit),
            self.scale_name: StoredTensor(tensor=scale, out_axis=0, in_axis=1, in_unit=GROUP_SIZE),
        }

    def to_weight(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape) -> QuantizedWeight:
        """The tensors as they are, less codes of other ranks that groups at the ends of this rank's share have."""
        codes = tensors[self.codes_name].view(torch.uint8)
        if self.is_grouped:
            start = shape.inputs.span.start % GROUP_SIZE // 2
            codes = codes.flatten(-2)[..., start : start + shape.num_in // 2].contiguous()
        scale, block = local_groups(tensors[self.scale_name], GROUP_SIZE, shape)
        return QuantizedWeight(number="float4", codes=codes, scale=scale, block=block, inputs=self.inputs)
