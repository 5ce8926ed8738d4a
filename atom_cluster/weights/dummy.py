"""Seeded random weights, for tests and benchmarks. The same full tensors for any number of ranks. Knows no models."""

from __future__ import annotations

import zlib

import torch

from atom_cluster.parallel.sharding import WeightPart
from atom_cluster.weights.rules import LoadableModel

_ROWS_PER_DRAW = 1024


def fill_weights(model: LoadableModel, seed: int) -> None:
    """Fill every tensor from `seed` and its name. Matrices keep the size of activations, vectors are near one.

    Does not call `finish_loading`.
    """
    for name, part in model.checkpoint_map().parts.items():
        if len(part.full_shape) == 1:
            full = 1.0 + 0.1 * _normal(name, seed, first_row=0, shape=part.full_shape)
            part.target.copy_(_cut(part, full))
        else:
            _fill_matrix(name, part, seed)


def _fill_matrix(name: str, part: WeightPart, seed: int) -> None:
    """In pieces of rows, each with its own seed: no rank holds or draws more than it needs by more than a piece."""
    num_rows, num_in = part.full_shape
    first, last = 0, num_rows
    if part.axis == 0 and part.span is not None:
        first, last = part.span.start, part.span.start + part.span.length
    for start in range(first // _ROWS_PER_DRAW * _ROWS_PER_DRAW, last, _ROWS_PER_DRAW):
        shape = (min(_ROWS_PER_DRAW, num_rows - start), num_in)
        rows = _normal(name, seed, first_row=start, shape=shape) * num_in**-0.5
        low, high = max(start, first), min(start + shape[0], last)
        rows = rows[low - start : high - start]
        if part.axis == 1 and part.span is not None:
            rows = rows[:, part.span.start : part.span.start + part.span.length]
        part.target[low - first : high - first].copy_(rows)


def _normal(name: str, seed: int, *, first_row: int, shape: tuple[int, ...]) -> torch.Tensor:
    key = zlib.crc32(f"{seed}/{name}/{first_row}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))


def _cut(part: WeightPart, full: torch.Tensor) -> torch.Tensor:
    if part.span is None:
        return full
    return full[part.span.start : part.span.start + part.span.length]
