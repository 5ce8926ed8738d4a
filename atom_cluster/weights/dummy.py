"""Seeded random weights, for tests and benchmarks. The same full tensors for any number of ranks. Knows no models."""

from __future__ import annotations

import math
import zlib

import torch

from atom_cluster.parallel.sharding import WeightPart
from atom_cluster.weights.rules import LoadableModel

_ELEMENTS_PER_DRAW = 1 << 20


def fill_weights(model: LoadableModel, seed: int) -> None:
    """Fill every tensor from `seed` and its name. Matrices keep the size of activations, vectors are near one.

    Does not call `finish_loading`.
    """
    for name, part in model.checkpoint_map().parts.items():
        if len(part.full_shape) < 2:
            drawn = 1.0 + 0.1 * _normal(name, seed, first_row=0, shape=part.full_shape)
            part.target.copy_(drawn[part.cut])
        else:
            _fill_matrix(name, part, seed)


def _fill_matrix(name: str, part: WeightPart, seed: int) -> None:
    """In pieces along the first axis, each with its own seed: no rank draws more than it needs by more than a piece."""
    num_rows, row_shape = part.full_shape[0], part.full_shape[1:]
    wanted = range(num_rows)[part.cut[0]] if part.cut else range(num_rows)
    num_in = part.full_shape[-2] if part.is_transposed else part.full_shape[-1]
    target = part.target.transpose(-2, -1) if part.is_transposed else part.target
    rows_per_draw = max(1, _ELEMENTS_PER_DRAW // math.prod(row_shape))
    for start in range(0, num_rows, rows_per_draw):
        rows = [(index, row - start) for index, row in enumerate(wanted) if start <= row < start + rows_per_draw]
        if not rows:
            continue
        shape = (min(rows_per_draw, num_rows - start), *row_shape)
        drawn = _normal(name, seed, first_row=start, shape=shape) * num_in**-0.5
        kept = drawn[[row for _, row in rows]][(slice(None), *part.cut[1:])]
        target[rows[0][0] : rows[-1][0] + 1].copy_(kept)


def _normal(name: str, seed: int, *, first_row: int, shape: tuple[int, ...]) -> torch.Tensor:
    key = zlib.crc32(f"{seed}/{name}/{first_row}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))
