"""Linear layers split over the ranks of a tensor-parallel group: by outputs, or by inputs with a sum afterwards.

Life of a layer: built with uninitialised tensors; `weight_parts` says where checkpoint tensors go; `finish_loading`
hands the tensors to the op backend and forgets them. Knows no checkpoint formats and no models.
Shape suffixes: T tokens, I inputs and O outputs of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atom_cluster.layers.context import LayerContext
from atom_cluster.ops.linear import LinearOp
from atom_cluster.parallel.collectives import all_reduce_sum
from atom_cluster.parallel.sharding import Span, WeightPart


@dataclass(frozen=True, slots=True)
class Outputs:
    """One of the projections that are fused into a layer's outputs."""

    full_size: int
    """Outputs over all ranks."""
    span: Span
    """Those of this rank."""


class _Weights:
    """The tensors of a layer while it is loaded, then the op made of them."""

    def __init__(self, context: LayerContext, *, num_out: int, num_in: int, has_bias: bool) -> None:
        self._context = context
        self.tensors = context.scheme.create_tensors(
            num_out, num_in, dtype=context.storage_dtype, device=context.device
        )
        self.bias = torch.empty(num_out, dtype=context.dtype, device=context.device) if has_bias else None

    def finish(self, *, uses_bias: bool) -> LinearOp:
        bias = self.bias if uses_bias else None
        context = self._context
        return context.scheme.prepare(self.tensors, bias, ops=context.ops, dtype=context.dtype)


class ColumnLinear:
    """Several projections of the same input, fused; each rank computes a span of each one's outputs."""

    op: LinearOp
    """Set by `finish_loading`."""

    def __init__(self, context: LayerContext, *, num_in: int, outputs: Sequence[Outputs], has_bias: bool) -> None:
        self._num_in = num_in
        self._outputs = tuple(outputs)
        num_out = sum(part.span.length for part in outputs)
        self._weights: _Weights | None = _Weights(context, num_out=num_out, num_in=num_in, has_bias=has_bias)

    def weight_parts(self, names: Sequence[str]) -> dict[str, WeightPart]:
        """Where the checkpoint's tensors go, by their names; `names` are the fused projections' prefixes, in order."""
        weights = _unfinished(self._weights)
        parts: dict[str, WeightPart] = {}
        offset = 0
        for name, outputs in zip(names, self._outputs, strict=True):
            rows = slice(offset, offset + outputs.span.length)
            offset = rows.stop
            for suffix, tensor in weights.tensors.items():
                parts[f"{name}.{suffix}"] = WeightPart(
                    target=tensor[rows], full_shape=(outputs.full_size, self._num_in), span=outputs.span
                )
            if weights.bias is not None:
                parts[f"{name}.bias"] = WeightPart(
                    target=weights.bias[rows], full_shape=(outputs.full_size,), span=outputs.span
                )
        return parts

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend."""
        self.op = _unfinished(self._weights).finish(uses_bias=True)
        self._weights = None

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, I] -> [T, O]: the projections' outputs of this rank, side by side."""
        return self.op(x_TI)


class RowLinear:
    """One projection whose inputs are split over the ranks; the result is summed, so every rank has all outputs."""

    op: LinearOp
    """Set by `finish_loading`."""

    def __init__(self, context: LayerContext, *, full_in: int, in_span: Span, num_out: int, has_bias: bool) -> None:
        self._group = context.groups.tensor
        self._full_shape = (num_out, full_in)
        self._in_span = in_span
        self._weights: _Weights | None = _Weights(context, num_out=num_out, num_in=in_span.length, has_bias=has_bias)

    def weight_parts(self, name: str) -> dict[str, WeightPart]:
        """Where the checkpoint's tensors go, by their names; `name` is the projection's prefix."""
        weights = _unfinished(self._weights)
        parts = {
            f"{name}.{suffix}": WeightPart(target=tensor, full_shape=self._full_shape, axis=1, span=self._in_span)
            for suffix, tensor in weights.tensors.items()
        }
        if weights.bias is not None:
            parts[f"{name}.bias"] = WeightPart(target=weights.bias, full_shape=self._full_shape[:1])
        return parts

    def finish_loading(self) -> None:
        """All weights are in place: prepare them for the op backend. The bias must be added once, so rank 0 has it."""
        self.op = _unfinished(self._weights).finish(uses_bias=self._group.rank == 0)
        self._weights = None

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, I] -> [T, all outputs]"""
        return all_reduce_sum(self.op(x_TI), self._group)


def _unfinished(weights: _Weights | None) -> _Weights:
    if weights is None:
        raise RuntimeError("the layer's weights were handed to the op backend already")
    return weights
