"""Which part of a checkpoint's tensor goes where in a stored weight, whatever its format. Knows no layers."""

from __future__ import annotations

import torch

from atom_cluster.parallel.sharding import WeightPart
from atom_cluster.quantization.scheme import LinearShape, StoredTensor
from atom_cluster.units import ceil_div


def stored_part(
    stored: StoredTensor, tensor: torch.Tensor, shape: LinearShape, index: int, *, num_leading: int = 0
) -> WeightPart:
    """Where the tensor of the `index`-th of the projections that are fused into a weight of this shape goes.

    tensor: `stored.tensor`, or one expert's of the stack; with `num_leading` 1, the stack of all experts, which have
    that axis in the checkpoint too.
    """
    if stored.out_axis is None:
        target = tensor.select(num_leading, index)
    else:
        sizes = [share.span.covering(stored.out_unit).length for share in shape.outputs]
        target = tensor.narrow(stored.out_axis + num_leading, sum(sizes[:index]), sizes[index])
    full_shape = list(target.shape)
    cut = [slice(None)] * len(full_shape)
    for axis, share, unit in (
        (stored.out_axis, shape.outputs[index], stored.out_unit),
        (stored.in_axis, shape.inputs, stored.in_unit),
    ):
        if axis is not None:
            full_shape[axis + num_leading] = ceil_div(share.full_size, unit)
            cut[axis + num_leading] = share.span.covering(unit).as_slice
    return WeightPart(target=target, full_shape=tuple(full_shape), cut=tuple(cut))
