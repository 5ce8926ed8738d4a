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
from atom_cluster.quantization.packing import codes_from_packed, shared_index, unpack_int32, zero_of
from atom_cluster.quantization.quantized import QuantizedScheme, check_multiple
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
    has_shape: bool = True
    """`weight_shape` [2], the sizes before packing. Not needed: they follow from the model."""

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
        group = self.group_size or shape.num_in
        check_multiple(shape, out_unit=per_int if self.has_zero else 1, in_unit=per_int, format_name="pack-quantized")
        # A rank's inputs may be of any group when an index says so, so it needs the scales of all.
        is_cut = self.group_size is not None and not self.has_group_index
        num_groups = (
            ceil_div(shape.num_in if is_cut else shape.full_in or shape.num_in, group) if self.group_size else 1
        )
        cut = {"in_axis": 1, "in_unit": group} if is_cut else {"in_axis": None}

        def empty(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape.stack, *sizes, dtype=dtype, device=device)

        codes = empty(shape.num_out, shape.num_in // per_int, dtype=torch.int32)
        scale = empty(shape.num_out, num_groups, dtype=torch.float32)
        tensors = {
            "weight_packed": StoredTensor(tensor=codes, out_axis=0, in_axis=1, in_unit=per_int),
            "weight_scale": StoredTensor(tensor=scale, out_axis=0, **cut),
        }
        if self.has_zero:
            zero = empty(shape.num_out // per_int, num_groups, dtype=torch.int32)
            tensors["weight_zero_point"] = StoredTensor(tensor=zero, out_axis=0, out_unit=per_int, **cut)
        if self.has_group_index:
            index = empty(len(shape.part_sizes), shape.num_in, dtype=torch.int32)
            tensors["weight_g_idx"] = StoredTensor(tensor=index, out_axis=None, in_axis=0)
        if self.has_shape:
            sizes = empty(len(shape.part_sizes), 2, dtype=torch.int64)
            tensors["weight_shape"] = StoredTensor(tensor=sizes, out_axis=None, in_axis=None)
        return tensors

    def to_weight(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape) -> QuantizedWeight:
        """Codes are stored in the order of the ops already."""
        number, codes = codes_from_packed(tensors["weight_packed"], self.num_bits)
        zero = tensors.get("weight_zero_point")
        if zero is not None:
            zero = unpack_int32(zero.transpose(-1, -2), self.num_bits).transpose(-1, -2)
            zero = zero_of(zero, self.num_bits).contiguous()
        index = tensors.get("weight_g_idx")
        return QuantizedWeight(
            number=number,
            codes=codes,
            scale=tensors["weight_scale"],
            block=(1, self.group_size or shape.num_in),
            zero=zero,
            input_group=None if index is None else shared_index(index),
        )
