"""Weights of compressed-tensors' `pack-quantized`: integers packed along inputs into int32, lowest bits first.

Inputs are used as they are. Codes, and zero points, which are packed along outputs, are stored with half their range
added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from atom_cluster.ops.quantized import QuantizedWeight
from atom_cluster.quantization.blocks import local_groups
from atom_cluster.quantization.packing import codes_from_packed, shared_index, unpack_int32, zero_of
from atom_cluster.quantization.quantized import QuantizedScheme, check_packing
from atom_cluster.quantization.scheme import LinearShape, StoredTensor
from atom_cluster.units import ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInt(QuantizedScheme):
    """`weight_packed` [out, in / n] for n codes to an int32, `weight_scale` [out, groups], and what options add."""

    num_bits: int
    """4 or 8."""
    group_size: int | None
    """Inputs that share a scale; None: all."""
    has_zero: bool
    """`weight_zero_point` [out / n, groups]; else codes are symmetric."""
    has_group_index: bool
    """`weight_g_idx` [in]: the group of each input."""

    mark: ClassVar[str] = "weight_packed"

    @property
    def name(self) -> str:
        """Everything that tells it from others."""
        kind = ("zero points, " if self.has_zero else "") + ("reordered, " if self.has_group_index else "")
        return f"int{self.num_bits} packed, {kind}groups of {self.group_size}"

    def create_tensors(
        self, shape: LinearShape, *, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, StoredTensor]:
        """Codes, scales, and what the options add."""
        per_int = 32 // self.num_bits
        check_packing(shape, out_unit=per_int if self.has_zero else 1, in_unit=per_int, format_name="pack-quantized")
        # A rank's inputs may be of any group when an index says so, so it needs the scales of all.
        num_groups, in_axis, in_unit = 1, None, 1
        if self.group_size is not None and self.has_group_index:
            num_groups = ceil_div(shape.inputs.full_size, self.group_size)
        elif self.group_size is not None:
            num_groups, in_axis, in_unit = shape.covering_in(self.group_size), 1, self.group_size

        def empty(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape.stack, *sizes, dtype=dtype, device=device)

        codes = empty(shape.num_out, shape.num_in // per_int, dtype=torch.int32)
        scale = empty(shape.num_out, num_groups, dtype=torch.float32)
        tensors = {
            "weight_packed": StoredTensor(tensor=codes, out_axis=0, in_axis=1, in_unit=per_int),
            "weight_scale": StoredTensor(tensor=scale, out_axis=0, in_axis=in_axis, in_unit=in_unit),
        }
        if self.has_zero:
            zero = empty(shape.num_out // per_int, num_groups, dtype=torch.int32)
            tensors["weight_zero_point"] = StoredTensor(
                tensor=zero, out_axis=0, in_axis=in_axis, out_unit=per_int, in_unit=in_unit
            )
        if self.has_group_index:
            index = empty(len(shape.part_sizes), shape.num_in, dtype=torch.int32)
            tensors["weight_g_idx"] = StoredTensor(tensor=index, out_axis=None, in_axis=0)
        return tensors

    def to_weight(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape) -> QuantizedWeight:
        """Codes are stored in the order of the ops already."""
        number, codes = codes_from_packed(tensors["weight_packed"], self.num_bits)
        scale, zero, index = tensors["weight_scale"], tensors.get("weight_zero_point"), tensors.get("weight_g_idx")
        if zero is not None:
            zero = unpack_int32(zero.transpose(-1, -2), self.num_bits).transpose(-1, -2)
            zero = zero_of(zero, self.num_bits).contiguous()
        block = (1, self.group_size or shape.num_in)
        if index is None:
            zero = None if zero is None else local_groups(zero, self.group_size, shape)[0]
            scale, block = local_groups(scale, self.group_size, shape)
        return QuantizedWeight(
            number=number,
            codes=codes,
            scale=scale,
            block=block,
            zero=zero,
            input_group=None if index is None else shared_index(index),
        )
