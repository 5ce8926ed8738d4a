"""Which part of a checkpoint's tensor goes where in a stored weight, whatever its format. Knows no layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atom_cluster.parallel.sharding import Span, WeightPart
from atom_cluster.quantization.scheme import StoredTensor
from atom_cluster.units import ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """One of the projections that are fused into a weight: which there, and what this rank has of it."""

    index: int
    local_sizes: Sequence[int]
    """Outputs of this rank of all fused projections."""
    full_out: int
    out_span: Span
    full_in: int
    in_span: Span


def stored_part(
    stored: StoredTensor, tensor: torch.Tensor, projection: Projection, *, what: str, num_leading: int = 0
) -> WeightPart:
    """Where one projection's tensor goes.

    tensor: `stored.tensor`, or one expert's of the stack; with `num_leading` 1, the stack of all experts, which have
    that axis in the checkpoint too. Raises ConfigError, naming `what`, when a rank's span cuts a unit in two.
    """
    if stored.out_axis is None:
        target = tensor.select(num_leading, projection.index)
    else:
        sizes = [ceil_div(size, stored.out_unit) for size in projection.local_sizes]
        index = projection.index
        target = tensor.narrow(stored.out_axis + num_leading, sum(sizes[:index]), sizes[index])
    full_shape = list(target.shape)
    cut = [slice(None)] * len(full_shape)
    for axis, span, size, unit in (
        (stored.out_axis, projection.out_span, projection.full_out, stored.out_unit),
        (stored.in_axis, projection.in_span, projection.full_in, stored.in_unit),
    ):
        if axis is not None:
            full_shape[axis + num_leading] = ceil_div(size, unit)
            cut[axis + num_leading] = span.in_units(unit, size, what=what).as_slice
    return WeightPart(target=target, full_shape=tuple(full_shape), cut=tuple(cut))
