"""The experts of a mixture: stacked gated MLPs, in any `LinearScheme`. Knows no routers and no models.

A group of ranks either splits every expert's intermediate dims, or, with expert parallelism, divides whole experts
among its ranks. In both cases each rank computes an addend of the result, which the caller sums over the ranks.
Shape suffixes: T tokens, D hidden dims, E experts and I intermediate dims of this rank, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from atom_cluster.errors import ConfigError
from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.module import Module
from atom_cluster.layers.stored_part import stored_part
from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertActivation, ExpertsOp
from atom_cluster.parallel.sharding import Share, WeightPart, WeightParts, even_span, expert_span
from atom_cluster.quantization.scheme import LinearShape, StoredTensor

_STACKED_NAMES = ("gate_up_proj", "down_proj")
_SINGLE_NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """Sizes over all ranks, and how a checkpoint names and arranges the tensors.

    Each expert has its own (`experts.3.gate_proj.weight`), or they are stacked (`experts.gate_up_proj`,
    `experts.down_proj`); the checkpoint's names tell.
    """

    num_experts: int
    hidden_size: int
    expert_size: int
    """Intermediate dims of an expert."""
    activation: ExpertActivation = ExpertActivation()
    has_bias: bool = False
    name: str = "experts"
    projection_names: tuple[str, str, str] = _SINGLE_NAMES
    """Of gate, up and down projection of an expert with its own tensors."""
    stacked_layout: Literal["concatenated", "interleaved"] = "concatenated"
    """concatenated: [E, 2 I, D], gate first, and [E, D, I]. interleaved: even outputs are gate's and odd ones up's,
    and unquantized weights are [E, D, 2 I] and [E, I, D]; such experts are always stacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """One of the two matrices of all experts, while it is loaded."""

    stacked_name: str
    names: tuple[str, ...]
    """Of the projections fused in it, behind an expert's name."""
    shape: LinearShape
    tensors: Mapping[str, StoredTensor]
    bias: StoredTensor | None

    def stored(self) -> Mapping[str, StoredTensor]:
        """All tensors, by suffix."""
        return self.tensors if self.bias is None else {**self.tensors, "bias": self.bias}


class Experts(Module):
    """Applies each token's experts and adds up their weighted outputs, as far as they are on this rank."""

    op: ExpertsOp
    """Set by `finish_loading`."""

    def __init__(self, context: LayerContext, spec: ExpertsSpec) -> None:
        """context: of the block that the experts are in."""
        tensor, expert = context.groups.tensor, context.groups.expert
        self._context = context = context.at(spec.name)
        self._spec = spec
        self._span = expert_span(spec.num_experts, expert)
        self._is_divided = expert.size > 1
        self._has_down_bias = self._is_divided or tensor.rank == 0
        self._is_interleaved = spec.stacked_layout == "interleaved"
        self._is_stacked = self._is_interleaved or context.full_name(_STACKED_NAMES[0]) in context.stored_dtypes
        self._scheme = context.scheme(self._layer_names())
        dims, hidden = Share.whole(spec.expert_size), Share.whole(spec.hidden_size)
        if not self._is_divided:
            span = even_span(spec.expert_size, tensor, what="intermediate dims of an expert")
            dims = Share(span, spec.expert_size)
        self._num_dims = dims.span.length
        *columns, row = spec.projection_names
        self._matrices = (
            self._create(_STACKED_NAMES[0], tuple(columns), outputs=dims, inputs=hidden),
            self._create(_STACKED_NAMES[1], (row,), outputs=hidden, inputs=dims),
        )
        self._is_prepared = False

    def _layer_names(self) -> tuple[str, ...]:
        """The projections, as a quantization plan knows them.

        One expert stands for all, as a plan may take long over a name: of one that is stored in another way, tensors
        would be missing from the checkpoint.
        """
        return _STACKED_NAMES if self._is_stacked else tuple(f"0.{name}" for name in self._spec.projection_names)

    def _create(self, stacked_name: str, names: tuple[str, ...], *, outputs: Share, inputs: Share) -> _Matrix:
        """outputs, inputs: of each projection."""
        shape = LinearShape(outputs=(outputs,) * len(names), inputs=inputs, num_experts=self._span.length)
        context, bias = self._context, None
        stored = [stacked_name] if self._is_stacked else [f"0.{name}.weight" for name in names]
        if self._spec.has_bias:
            zeros_EO = torch.zeros(*shape.stack, shape.num_out, dtype=context.dtype, device=context.device)
            bias = StoredTensor(tensor=zeros_EO, out_axis=0, in_axis=None)
        return _Matrix(
            stacked_name=stacked_name,
            names=names,
            shape=shape,
            tensors=self._scheme.create_tensors(shape, dtype=context.storage_dtype(stored), device=context.device),
            bias=bias,
        )

    def weight_parts(self) -> Mapping[str, WeightParts]:
        """Where the checkpoint's tensors go, by their full names."""
        if self._is_prepared:
            raise RuntimeError("the experts' weights were handed to the op backend already")
        parts: dict[str, WeightParts] = {}
        for matrix in self._matrices:
            for suffix, stored in matrix.stored().items():
                parts.update((self._stacked_parts if self._is_stacked else self._single_parts)(matrix, suffix, stored))
        return parts

    def _single_parts(self, matrix: _Matrix, suffix: str, stored: StoredTensor) -> dict[str, WeightParts]:
        parts: dict[str, WeightParts] = {}
        for index, name in enumerate(matrix.names):
            here = [stored_part(stored, of_expert, matrix.shape, index) for of_expert in stored.tensor]
            # Experts of other ranks must be in the checkpoint too, and as large; nothing of them is copied.
            elsewhere = WeightPart(
                target=stored.tensor.new_empty((0, *here[0].target.shape[1:])),
                full_shape=here[0].full_shape,
                cut=(slice(0, 0),) if here[0].full_shape else (),
            )
            for expert in range(self._spec.num_experts):
                is_here = self._span.start <= expert < self._span.stop
                part = here[expert - self._span.start] if is_here else elsewhere
                parts[self._context.full_name(f"{expert}.{name}.{suffix}")] = part
        return parts

    def _stacked_parts(self, matrix: _Matrix, suffix: str, stored: StoredTensor) -> dict[str, WeightParts]:
        name = matrix.stacked_name if suffix == "weight" else f"{matrix.stacked_name}_{suffix}"
        full_name = self._context.full_name(name)
        is_transposed = self._is_interleaved and suffix == "weight"
        parts = []
        for index in range(len(matrix.names)):
            part = stored_part(stored, stored.tensor, matrix.shape, index, num_leading=1)
            full_shape, cut = [self._spec.num_experts, *part.full_shape[1:]], [self._span.as_slice, *part.cut[1:]]
            if stored.out_axis is not None and len(matrix.names) > 1:
                axis = 1 + stored.out_axis
                cut[axis] = self._among_both(cut[axis], index, full_shape[axis], stored, what=full_name)
                full_shape[axis] *= 2
            if is_transposed:
                full_shape[1:], cut[1:] = full_shape[:0:-1], cut[:0:-1]
            parts.append(
                WeightPart(
                    target=part.target, full_shape=tuple(full_shape), cut=tuple(cut), is_transposed=is_transposed
                )
            )
        return {full_name: tuple(parts)}

    def _among_both(self, rows: slice, index: int, size: int, stored: StoredTensor, *, what: str) -> slice:
        """Indices `rows` of one projection of `size`, as indices where gate's and up's are together."""
        start, stop = int(rows.start), int(rows.stop)
        if not self._is_interleaved:
            return slice(index * size + start, index * size + stop)
        if stored.out_unit != 1:
            raise ConfigError(f"{what}: one value for several outputs of gate and up in turn is not supported")
        return slice(2 * start + index, 2 * stop, 2)

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend."""
        gate_up, down = self._matrices
        self.op = self._scheme.prepare_experts(
            {suffix: stored.tensor for suffix, stored in gate_up.tensors.items()},
            {suffix: stored.tensor for suffix, stored in down.tensors.items()},
            gate_up_bias=None if gate_up.bias is None else gate_up.bias.tensor,
            down_bias=None if down.bias is None or not self._has_down_bias else down.bias.tensor,
            activation=self._spec.activation,
            gate_up_shape=gate_up.shape,
            down_shape=down.shape,
            ops=self._context.ops,
            dtype=self._context.dtype,
        )
        del self._matrices
        self._is_prepared = True

    @property
    def widest(self) -> int:
        """Per expert of a token: gate, up and what the activation makes of them, or that and what the second product
        makes of it, which is summed over a token's experts only when all have it."""
        return self._num_dims + max(2 * self._num_dims, self._spec.hidden_size)

    def linear_ops(self) -> list[LinearOp | ExpertsOp]:
        """All experts together."""
        return [self.op]

    def __call__(
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        *,
        addend_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, D] -> this rank's addend of the result, plus `addend_TD`, [T, D]. expert_TK: int64, among all experts."""
        if self._is_divided:
            local_TK = expert_TK - self._span.start
            is_elsewhere_TK = (local_TK < 0) | (local_TK >= self._span.length)
            expert_TK = local_TK.masked_fill(is_elsewhere_TK, self._span.length)
        return self.op(x_TD, expert_TK, weight_TK, addend_TD=addend_TD)
