"""LinearScheme: how a linear layer's weights are stored, loaded and applied. Knows no layers and no files.

A weight [out, in] is stored as one tensor (`weight`) or several (`weight`, `weight_scale`; `qweight`, `qzeros`, ...).
Layers shard them and fuse projections without knowing the format: a `StoredTensor` says which of its axes runs along
outputs and inputs, and how many of those one index stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertActivation, ExpertsOp
from atom_cluster.ops.table import OpTable
from atom_cluster.parallel.sharding import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """A weight on this rank: one or several projections of the same inputs, their outputs behind each other."""

    outputs: tuple[Share, ...]
    """Of each fused projection."""
    inputs: Share
    num_experts: int | None = None
    """A stack of so many equal weights: each tensor has one more axis, in front. None: a single weight."""

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Outputs of each fused projection."""
        return tuple(share.span.length for share in self.outputs)

    @property
    def num_in(self) -> int:
        """Inputs."""
        return self.inputs.span.length

    @property
    def num_out(self) -> int:
        """Outputs of all projections."""
        return sum(self.part_sizes)

    def covering_out(self, unit: int) -> int:
        """Indices that stand for `unit` outputs each and cover those of all projections."""
        return sum(share.span.covering(unit).length for share in self.outputs)

    def covering_in(self, unit: int) -> int:
        """The same of inputs."""
        return self.inputs.span.covering(unit).length

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading dims of every tensor."""
        return () if self.num_experts is None else (self.num_experts,)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a stored weight, uninitialised. Axes are counted without the axis of stacked experts."""

    tensor: torch.Tensor
    """Behind the stack's axis, if any. With `out_axis`: that axis has, for each fused projection in turn, the indices
    that cover its outputs. Without: the first axis has one index per fused projection."""
    out_axis: int | None
    """None: the same for all outputs of a projection (a scale per tensor, say)."""
    in_axis: int | None
    """None: the same for all inputs."""
    out_unit: int = 1
    """Outputs per index of `out_axis`: 8 where eight 4-bit outputs share an int32, 128 for scales of blocks. Where a
    rank's outputs begin or end within an index, it has all of that."""
    in_unit: int = 1
    """The same of inputs."""


class LinearScheme(Protocol):
    """One quantization format. Stateless: layers own the tensors."""

    @property
    def name(self) -> str:
        """Name in logs and fingerprints."""
        ...

    def create_tensors(
        self, shape: LinearShape, *, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, StoredTensor]:
        """Uninitialised tensors of a weight, by the suffix they have in checkpoints. `dtype`: of unquantized weights.

        Raises ConfigError when a weight of this shape cannot have this format.
        """
        ...

    def prepare(
        self,
        tensors: Mapping[str, torch.Tensor],
        bias: torch.Tensor | None,
        *,
        shape: LinearShape,
        ops: OpTable,
        dtype: torch.dtype,
    ) -> LinearOp:
        """The op that applies loaded tensors to inputs of `dtype`. The caller drops its references afterwards."""
        ...

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], *, shape: LinearShape, dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight that loaded tensors stand for, [*stack, out, in], for a layer that needs its numbers.

        May share memory with `tensors`, which the caller drops afterwards.
        """
        ...

    def prepare_experts(
        self,
        gate_up: Mapping[str, torch.Tensor],
        down: Mapping[str, torch.Tensor],
        *,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        activation: ExpertActivation,
        gate_up_shape: LinearShape,
        down_shape: LinearShape,
        ops: OpTable,
        dtype: torch.dtype,
    ) -> ExpertsOp:
        """The same for stacked experts: gate and up projections fused (part_sizes (I, I)), and down projections."""
        ...


class QuantizationPlan(Protocol):
    """Which scheme each layer of a checkpoint has."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """Regular expressions of tensors that the format may add to a checkpoint and that carry nothing needed."""
        ...

    def linear(self, name: str) -> LinearScheme:
        """The scheme of the projection with this name in the checkpoint, such as `model.layers.0.mlp.gate_proj`."""
        ...
