"""What blocks of a checkpoint's weight have (scales, zero points), for blocks of a rank's part of it. Knows no formats.

Where a rank's share cuts blocks, its own are smaller, and several have what one of the checkpoint has: the numbers stay
those of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from atom_cluster.parallel.sharding import Share
from atom_cluster.quantization.scheme import LinearShape


def local_blocks(
    per_block: torch.Tensor, block: tuple[int, int], shape: LinearShape
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The same for blocks counted from the rank's first output and input, and their sizes.

    per_block: [*stack, rows, columns], of all blocks that the rank has anything of, one projection's behind another's.
    """
    rows, row_index = _finer(shape.outputs, block[0])
    columns, column_index = _finer((shape.inputs,), block[1])
    for axis, index in ((-2, row_index), (-1, column_index)):
        if index is not None:
            per_block = per_block.index_select(axis, torch.tensor(index, device=per_block.device))
    return per_block, (rows, columns)


def local_groups(
    per_group: torch.Tensor, group_size: int | None, shape: LinearShape
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The same for groups of inputs, [*stack, outputs, groups]. group_size None: one group."""
    if group_size is None:
        return per_group, (1, shape.num_in)
    return local_blocks(per_group, (1, group_size), shape)


def _finer(shares: Sequence[Share], unit: int) -> tuple[int, list[int] | None]:
    """Size of blocks that no share and no unit cuts, and the stored index of each; None: blocks are those stored."""
    lengths = [share.span.length for share in shares]
    finer = math.gcd(*(share.common_unit(unit) for share in shares), *lengths[:-1])
    if finer == unit:
        return unit, None
    index, num_before = [], 0
    for share in shares:
        stored = share.span.covering(unit)
        starts = range(share.span.start, share.span.stop, finer)
        index += [num_before + start // unit - stored.start for start in starts]
        num_before += stored.length
    return finer, index
