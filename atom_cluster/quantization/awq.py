"""Weights of AWQ (its GEMM form): four-bit integers packed along outputs into int32, in the order 0 2 4 6 1 3 5 7."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from atom_cluster.ops.number_formats import pack_nibbles
from atom_cluster.ops.quantized import QuantizedWeight
from atom_cluster.quantization.blocks import local_groups
from atom_cluster.quantization.packing import unpack_int32
from atom_cluster.quantization.quantized import QuantizedScheme, check_packing
from atom_cluster.quantization.scheme import LinearShape, StoredTensor

_PER_INT = 8
_PLACE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of an int32, counted from the lowest, each of its outputs has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(QuantizedScheme):
    """`qweight` [in, out / 8], `qzeros` [groups, out / 8], `scales` [groups, out]; inputs as they are."""

    group_size: int | None
    """Inputs that share a scale; None: all."""

    mark: ClassVar[str] = "qweight"

    @property
    def name(self) -> str:
        """Everything that tells it from others."""
        return f"awq int4, groups of {self.group_size}"

    def create_tensors(
        self, shape: LinearShape, *, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, StoredTensor]:
        """Codes, zero points and scales."""
        check_packing(shape, out_unit=_PER_INT, in_unit=2, format_name="awq")
        num_packed = shape.num_out // _PER_INT
        num_groups = 1 if self.group_size is None else shape.covering_in(self.group_size)
        in_axis, in_unit = (None, 1) if self.group_size is None else (0, self.group_size)

        def empty(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape.stack, *sizes, dtype=dtype, device=device)

        return {
            "qweight": StoredTensor(
                tensor=empty(shape.num_in, num_packed, dtype=torch.int32), out_axis=1, in_axis=0, out_unit=_PER_INT
            ),
            "qzeros": StoredTensor(
                tensor=empty(num_groups, num_packed, dtype=torch.int32),
                out_axis=1,
                in_axis=in_axis,
                out_unit=_PER_INT,
                in_unit=in_unit,
            ),
            "scales": StoredTensor(
                tensor=empty(num_groups, shape.num_out, dtype=torch.float32),
                out_axis=1,
                in_axis=in_axis,
                in_unit=in_unit,
            ),
        }

    def to_weight(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape) -> QuantizedWeight:
        """Outputs first, then packed along inputs; of stacked experts one at a time, which bounds memory."""
        qweight = tensors["qweight"]
        stack = qweight.shape[:-2]
        codes = torch.empty(*stack, shape.num_out, shape.num_in // 2, dtype=torch.uint8, device=qweight.device)
        for one, packed in zip(
            codes.flatten(0, -3) if stack else [codes], qweight.flatten(0, -3) if stack else [qweight]
        ):
            one.copy_(pack_nibbles(_in_order(packed).T))
        scale, block = local_groups(tensors["scales"].transpose(-1, -2), self.group_size, shape)
        zero, _ = local_groups(_in_order(tensors["qzeros"]).transpose(-1, -2), self.group_size, shape)
        return QuantizedWeight(
            number="int4",
            codes=codes,
            scale=scale.contiguous(),
            block=block,
            zero=zero.to(torch.int16).contiguous(),
        )


def _in_order(packed: torch.Tensor) -> torch.Tensor:
    """int32 [..., n] -> uint8 [..., 8 n], in the order of outputs."""
    codes = unpack_int32(packed, 4)
    by_int = codes.view(*packed.shape, _PER_INT)
    return by_int[..., list(_PLACE_OF_OUTPUT)].flatten(-2)
