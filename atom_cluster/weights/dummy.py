"""Seeded random weights, for tests and benchmarks. The same full tensors for any number of ranks. Knows no models.

Values are windows into one pool of random values, so that a rank's part costs no more than copying it, however large
the full tensor is. What a tensor is made of follows from its dtype and, for quantized layers, from its name.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch

from atom_cluster.parallel.sharding import WeightPart
from atom_cluster.weights.rules import LoadableModel

_POOL_SIZE = 1 << 22
_MAX_WINDOW = 1 << 20
"""Most values of one window: neighbours in a tensor that are neighbours in the pool."""
_SCALE = 2.0**-6
"""About what scales of quantized weights are: products of layers stay within the range of any float."""
_E8M0_BIAS = 127


@dataclass(frozen=True, slots=True)
class _Block:
    """Part of a full tensor `name`: `target` = full[cut], where `shape` is that of full."""

    name: str
    shape: tuple[int, ...]
    cut: tuple[slice, ...]
    target: torch.Tensor


class _Pool:
    """Random values of one kind, of which tensors take windows."""

    def __init__(self, seed: int, values: torch.Tensor) -> None:
        self._seed = seed
        self._values = values

    def fill(self, block: _Block) -> None:
        """Fill a block, row by row of its first axis where rows are long, else in runs of rows."""
        row_shape = block.shape[1:]
        row_size = math.prod(row_shape)
        rows = range(block.shape[0])[block.cut[0]]
        if row_shape and row_size > _MAX_WINDOW:
            for index, row in enumerate(rows):
                inner = _Block(f"{block.name}/{row}", row_shape, block.cut[1:], block.target[index])
                self.fill(inner)
            return
        rows_per_window = max(1, _MAX_WINDOW // row_size)
        done = 0
        while done < len(rows):
            first = rows[done] // rows_per_window * rows_per_window
            kept = range(rows[done], min(first + rows_per_window, rows.stop), rows.step)
            window = self._window(f"{block.name}/{first}", rows_per_window * row_size)
            local = slice(kept[0] - first, kept[-1] + 1 - first, rows.step)
            values = window.view(rows_per_window, *row_shape)[(local, *block.cut[1:])]
            block.target[done : done + len(kept)].copy_(values)
            done += len(kept)

    def _window(self, name: str, size: int) -> torch.Tensor:
        start = zlib.crc32(f"{self._seed}/{name}".encode()) % (len(self._values) - size + 1)
        return self._values[start : start + size]


def fill_weights(model: LoadableModel, seed: int) -> None:
    """Fill every tensor from `seed` and its name. Matrices keep the size of activations, vectors are near one.

    Quantized tensors: codes are spread over all values of an integer dtype and are normal in float8; tensors named as
    scales are small and positive; indices (int64, `g_idx`) are zero. Does not call `finish_loading`.
    """
    pools: dict[tuple[object, ...], _Pool] = {}
    for name, part in model.checkpoint_map().each_part():
        kind, dtype, device = _kind(name, part), part.target.dtype, part.target.device
        num_in = part.full_shape[-2 if part.is_transposed else -1] if kind == "matrix" else 1
        key = (kind, num_in, dtype, device)
        if key not in pools:
            pools[key] = _Pool(seed, _draw(kind, num_in, dtype, seed).to(device))
        if part.target.numel():
            pools[key].fill(_block(name, part))


def _block(name: str, part: WeightPart) -> _Block:
    """The whole part. A scalar counts as a vector of one."""
    target = part.target.transpose(-2, -1) if part.is_transposed else part.target
    shape = part.full_shape or (1,)
    cut = (*part.cut, *[slice(None)] * (len(shape) - len(part.cut)))
    return _Block(name, shape, cut, target if part.full_shape else target.view(1))


def _kind(name: str, part: WeightPart) -> str:
    dtype = part.target.dtype
    if dtype in (torch.int64, torch.bool) or name.endswith("g_idx"):
        return "zeros"
    if "scale" in name.rpartition(".")[2] or dtype == torch.float8_e8m0fnu:
        return "scales"
    if dtype.itemsize == 1 or not dtype.is_floating_point:
        return "codes"
    return "matrix" if len(part.full_shape) > 1 else "vector"


def _draw(kind: str, num_in: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """The values of a pool. num_in: of a matrix, whose products are to be as large as its inputs."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "zeros":
        return torch.zeros(_POOL_SIZE, dtype=dtype)
    if kind == "scales" and not dtype.is_floating_point:  # exponents of powers of two
        exponent = _E8M0_BIAS + round(math.log2(_SCALE))
        return torch.randint(exponent - 1, exponent + 2, (_POOL_SIZE,), generator=generator, dtype=dtype)
    if kind == "scales":
        return (_SCALE * (0.5 + torch.rand(_POOL_SIZE, generator=generator))).to(dtype)
    if not dtype.is_floating_point:
        num_bytes = _POOL_SIZE * dtype.itemsize
        return torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8).view(dtype)
    normal = torch.randn(_POOL_SIZE, generator=generator)
    return (1.0 + 0.1 * normal if kind == "vector" else normal * num_in**-0.5).to(dtype)
