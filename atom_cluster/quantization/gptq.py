"""Weights of GPTQ: integers packed into int32, `qweight` along inputs, `qzeros` along outputs, lowest bits first."""

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
class Gptq(QuantizedScheme):
    """`qweight` [in / n, out], `qzeros` [groups, out / n], `scales` [groups, out], `g_idx` [in]; inputs as they are."""

    num_bits: int
    """4 or 8."""
    group_size: int | None
    """Inputs that share a scale; None: all."""
    is_reordered: bool
    """Inputs were quantized in another order (`desc_act`): `g_idx` says the group of each. Else it adds nothing."""
    has_zero_offset: bool
    """Zero points are stored less one, as the first version of the format has it."""

    mark: ClassVar[str] = "qweight"

    @property
    def name(self) -> str:
        """Everything that tells it from others."""
        order = "reordered, " if self.is_reordered else ""
        return f"gptq int{self.num_bits}, {order}groups of {self.group_size}, v{1 if self.has_zero_offset else 2}"

    def create_tensors(
        self, shape: LinearShape, *, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, StoredTensor]:
        """Codes, zero points, scales, and the group of each input."""
        per_int = 32 // self.num_bits
        check_packing(shape, out_unit=per_int, in_unit=per_int, format_name="gptq")
        # A rank's inputs may be of any group when they were reordered, so it needs the scales of all.
        num_groups, in_axis, in_unit = 1, None, 1
        if self.group_size is not None and self.is_reordered:
            num_groups = ceil_div(shape.inputs.full_size, self.group_size)
        elif self.group_size is not None:
            num_groups, in_axis, in_unit = shape.covering_in(self.group_size), 0, self.group_size

        def empty(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape.stack, *sizes, dtype=dtype, device=device)

        return {
            "qweight": StoredTensor(
                tensor=empty(shape.num_in // per_int, shape.num_out, dtype=torch.int32),
                out_axis=1,
                in_axis=0,
                in_unit=per_int,
            ),
            "qzeros": StoredTensor(
                tensor=empty(num_groups, shape.num_out // per_int, dtype=torch.int32),
                out_axis=1,
                in_axis=in_axis,
                out_unit=per_int,
                in_unit=in_unit,
            ),
            "scales": StoredTensor(
                tensor=empty(num_groups, shape.num_out, dtype=torch.float32),
                out_axis=1,
                in_axis=in_axis,
                in_unit=in_unit,
            ),
            "g_idx": StoredTensor(
                tensor=empty(len(shape.part_sizes), shape.num_in, dtype=torch.int32), out_axis=None, in_axis=0
            ),
        }

    def to_weight(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape) -> QuantizedWeight:
        """Turned round: outputs first."""
        number, codes = codes_from_packed(tensors["qweight"].transpose(-1, -2), self.num_bits)
        zero = unpack_int32(tensors["qzeros"], self.num_bits).to(torch.int16)
        zero = (zero + int(self.has_zero_offset)) & (2**self.num_bits - 1)
        scale = tensors["scales"].transpose(-1, -2)
        zero = zero_of(zero, self.num_bits).transpose(-1, -2)
        block = (1, self.group_size or shape.num_in)
        if not self.is_reordered:
            zero, _ = local_groups(zero, self.group_size, shape)
            scale, block = local_groups(scale, self.group_size, shape)
        return QuantizedWeight(
            number=number,
            codes=codes,
            scale=scale.contiguous(),
            block=block,
            zero=zero.contiguous(),
            input_group=shared_index(tensors["g_idx"]) if self.is_reordered else None,
        )
