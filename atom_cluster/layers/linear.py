"""Linear layers split over the ranks of a tensor-parallel group: by outputs, or by inputs with a sum afterwards.

Their weights may be stored in any `LinearScheme`. `finish_loading` hands the tensors to the op backend and forgets
them. Knows no checkpoint formats and no models. Shape suffixes: T tokens, I inputs and O outputs of this rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.layers.module import Module
from atom_cluster.layers.stored_part import stored_part
from atom_cluster.ops.linear import LinearOp
from atom_cluster.ops.moe import ExpertsOp
from atom_cluster.parallel.collectives import all_reduce_sum, is_worth_overlapping, sum_while_computing
from atom_cluster.parallel.sharding import Share, Span, WeightPart, WeightParts
from atom_cluster.quantization.scheme import LinearShape


@dataclass(frozen=True, slots=True)
class Output:
    """One of the projections that are fused into a layer's outputs. Several may be spans of one tensor."""

    name: str
    """Of its tensors, behind the layer's name; empty when it is the layer's."""
    full_size: int
    """Outputs of its tensors: over all ranks, and over all that share the name."""
    span: Span | None = None
    """Those of this rank; None: all, on every rank."""

    @property
    def local(self) -> Span:
        """Those of this rank."""
        return Span(0, self.full_size) if self.span is None else self.span


class _Linear(Module):
    """Projections of the same inputs, stored in one scheme: tensors while they are loaded, then the op made of them."""

    op: LinearOp
    """Set by `finish_loading`."""

    def __init__(
        self, context: LayerContext, *, full_in: int, in_span: Span, outputs: Sequence[Output], has_bias: bool
    ) -> None:
        self._context = context
        self._outputs = tuple(outputs)
        self._scheme = context.scheme([output.name for output in outputs])
        self._shape = LinearShape(
            outputs=tuple(Share(output.local, output.full_size) for output in outputs), inputs=Share(in_span, full_in)
        )
        dtype = context.storage_dtype([f"{output.name}.weight" if output.name else "weight" for output in outputs])
        self._tensors = self._scheme.create_tensors(self._shape, dtype=dtype, device=context.device)
        self._bias_O = (
            torch.empty(self._shape.num_out, dtype=context.dtype, device=context.device) if has_bias else None
        )
        self._is_prepared = False

    def weight_parts(self) -> Mapping[str, WeightParts]:
        """Where the checkpoint's tensors go, by their full names."""
        if self._is_prepared:
            raise RuntimeError("the layer's weights were handed to the op backend already")
        parts: defaultdict[str, list[WeightPart]] = defaultdict(list)
        for index, output in enumerate(self._outputs):
            name = self._context.full_name(output.name)
            for suffix, stored in self._tensors.items():
                parts[f"{name}.{suffix}"].append(stored_part(stored, stored.tensor, self._shape, index))
            if self._bias_O is not None:
                start = sum(self._shape.part_sizes[:index])
                target = self._bias_O[start : start + output.local.length]
                part = WeightPart(target=target, full_shape=(output.full_size,), cut=(output.local.as_slice,))
                parts[f"{name}.bias"].append(part)
        return {name: found[0] if len(found) == 1 else tuple(found) for name, found in parts.items()}

    def _prepare(self, *, uses_bias: bool) -> None:
        if self._is_prepared:
            raise RuntimeError("the layer's weights were handed to the op backend already")
        tensors = {suffix: stored.tensor for suffix, stored in self._tensors.items()}
        bias = self._bias_O if uses_bias else None
        context = self._context
        self.op = self._scheme.prepare(tensors, bias, shape=self._shape, ops=context.ops, dtype=context.dtype)
        self._tensors, self._bias_O, self._is_prepared = {}, None, True

    @property
    def widest(self) -> int:
        """Its outputs on this rank."""
        return self._shape.num_out

    def linear_ops(self) -> list[LinearOp | ExpertsOp]:
        """The one product."""
        return [self.op]


class ColumnLinear(_Linear):
    """Several projections of the same input, fused; each rank computes a span of each one's outputs."""

    def __init__(
        self, context: LayerContext, *, num_in: int, outputs: Sequence[Output], has_bias: bool = False
    ) -> None:
        super().__init__(context, full_in=num_in, in_span=Span(0, num_in), outputs=outputs, has_bias=has_bias)

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend."""
        self._prepare(uses_bias=True)

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, I] -> [T, O]: the projections' outputs of this rank, side by side."""
        return self.op(x_TI)


class DequantizedLinear(_Linear):
    """One projection whose numbers a layer needs, not just the product; each rank has a span of its outputs."""

    def __init__(self, context: LayerContext, *, num_in: int, output: Output) -> None:
        super().__init__(context, full_in=num_in, in_span=Span(0, num_in), outputs=[output], has_bias=False)

    def use_weight(self, weight_OI: torch.Tensor) -> None:
        """Subclasses take the weight, in the dtype of activations."""
        raise NotImplementedError

    def finish_loading(self) -> None:
        """All weights are in place: work out what their stored form stands for."""
        tensors = {suffix: stored.tensor for suffix, stored in self._tensors.items()}
        self._tensors, self._is_prepared = {}, True
        self.use_weight(self._scheme.dequantize(tensors, shape=self._shape, dtype=self._context.dtype))

    def linear_ops(self) -> list[LinearOp | ExpertsOp]:
        """None."""
        return []


class RowLinear(_Linear):
    """One projection whose inputs are split over the ranks; the result is summed, so every rank has all outputs.

    Its tensors have the layer's own name.
    """

    def __init__(
        self,
        context: LayerContext,
        *,
        full_in: int,
        in_span: Span,
        num_out: int,
        has_bias: bool = False,
        sums: bool = True,
    ) -> None:
        """`sums` False leaves each rank with its own addend, for a caller that sums several layers' at once."""
        super().__init__(context, full_in=full_in, in_span=in_span, outputs=[Output("", num_out)], has_bias=has_bias)
        self._group = context.groups.tensor
        self._sums = sums

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend. The bias must be added once, so rank 0 has it."""
        self._prepare(uses_bias=self._group.rank == 0)

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, I] -> [T, all outputs]"""
        if not self._sums:
            return self.op(x_TI)
        if is_worth_overlapping(x_TI.shape[0], self._group):
            return sum_while_computing(self.op, x_TI, self._group)
        return all_reduce_sum(self.op(x_TI), self._group)
