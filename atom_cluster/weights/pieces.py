"""How a part of a stored tensor is read: in pieces, each one range of the file's bytes. Knows no checkpoints.

A piece whose bytes are exactly its target's is read in place. All others go through a buffer of `PIECE_BYTES`: cuts
that leave gaps (whole rows are read, which is faster than many small reads), other dtypes, other devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from atom_cluster.parallel.sharding import WeightPart
from atom_cluster.weights.safetensors_file import DTYPES, PLAIN_FLOATS, SafetensorsFile, TensorEntry

PIECE_BYTES = 16 << 20
"""Most bytes of a piece. Large enough that nothing but the bytes takes time."""
_MIN_SEPARATE_BYTES = 256 << 10
"""Runs of bytes from here on are read one by one; shorter ones together with what is between them."""


def accepts(target: torch.dtype, stored: str) -> bool:
    """Whether a tensor of this dtype takes a stored one: any plain float another, all others their like.

    Indices of four bytes are widened to eight.
    """
    if target in PLAIN_FLOATS.values():
        return stored in PLAIN_FLOATS
    if _is_widened(target, stored):
        return True
    return DTYPES.get(stored) == target or (stored, target) == ("F8_E8M0", torch.uint8)


def _is_widened(target: torch.dtype, stored: str) -> bool:
    return target == torch.int64 and stored == "I32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`target` = the values of this shape at `offset` of the file, `[cut]`. All cuts have positive steps."""

    file: SafetensorsFile
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    cut: tuple[slice, ...]
    """One per axis, with bounds and step spelt out."""
    target: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_in_place(self) -> bool:
        """Whether the bytes can be read into the target as they are."""
        is_whole = all(_is_whole(part, size) for part, size in zip(self.cut, self.shape, strict=True))
        is_alike = self.target.dtype == self.dtype and self.target.is_contiguous()
        return is_whole and is_alike and self.target.device.type == "cpu"


def split(file: SafetensorsFile, entry: TensorEntry, part: WeightPart) -> Iterator[Piece]:
    """The pieces of a part, in the order of the file. Shape and dtype must have been checked."""
    target = part.target.transpose(-2, -1) if part.is_transposed else part.target
    dtype = DTYPES[entry.dtype_name]
    if dtype not in PLAIN_FLOATS.values() and not _is_widened(target.dtype, entry.dtype_name):
        dtype = target.dtype  # the same, or raw bytes
    # A scalar counts as a vector of one.
    shape = entry.shape or (1,)
    target = target.reshape(1) if target.dim() == 0 else target
    cut = (*part.cut, *[slice(None)] * (len(shape) - len(part.cut)))
    spelt_out = tuple(slice(*bounds.indices(size)) for bounds, size in zip(cut, shape, strict=True))
    if target.numel():
        yield from _split(Piece(file=file, offset=entry.offset, dtype=dtype, shape=shape, cut=spelt_out, target=target))


def _split(piece: Piece) -> Iterator[Piece]:
    """Along the first axis: into runs of whole rows, or row by row where rows are long or hardly needed whole."""
    rows, row_shape = piece.cut[0], piece.shape[1:]
    row_bytes = math.prod(row_shape) * piece.dtype.itemsize
    if row_shape and (row_bytes > PIECE_BYTES or _is_worth_reading_apart(piece)):
        for index, row in enumerate(range(rows.start, rows.stop, rows.step)):
            offset = piece.offset + row * row_bytes
            inner = replace(piece, offset=offset, shape=row_shape, cut=piece.cut[1:], target=piece.target[index])
            yield from _split(inner)
        return
    kept = range(rows.start, rows.stop, rows.step)
    kept_per_piece = (PIECE_BYTES // row_bytes - 1) // rows.step + 1
    for first in range(0, len(kept), kept_per_piece):
        some = kept[first : first + kept_per_piece]
        num_rows = some[-1] + 1 - some[0]
        yield replace(
            piece,
            offset=piece.offset + some[0] * row_bytes,
            shape=(num_rows, *row_shape),
            cut=(slice(0, num_rows, rows.step), *piece.cut[1:]),
            target=piece.target[first : first + len(some)],
        )


def _is_worth_reading_apart(piece: Piece) -> bool:
    """Whether each row has a long run of bytes that are needed, and bytes that are not."""
    is_gapless = piece.cut[0].step == 1 and all(map(_is_whole, piece.cut[1:], piece.shape[1:]))
    inner = piece.cut[1]
    run_bytes = (inner.stop - inner.start) * math.prod(piece.shape[2:]) * piece.dtype.itemsize
    return not is_gapless and run_bytes >= _MIN_SEPARATE_BYTES


def _is_whole(cut: slice, size: int) -> bool:
    return (cut.start, cut.stop, cut.step) == (0, size, 1)


class Staging:
    """One thread's way to load pieces, with buffers for those that cannot be read in place. Not thread-safe.

    Targets on a CPU are filled from one buffer. Others are fed from two in pinned memory, without waiting for the copy
    out of one before the other is filled.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._pinned: list[torch.Tensor] = []
        self._copied: list[torch.Event | None] = [None, None]
        self._turn = 0

    def load(self, piece: Piece) -> None:
        """Read a piece into its target. On devices other than CPUs, the copy may still be under way; see `finish`."""
        if piece.is_in_place:
            piece.file.read_into(_bytes_of(piece.target), piece.offset)
            return
        is_on_cpu = piece.target.device.type == "cpu"
        buffer = (self._host_buffer() if is_on_cpu else self._pinned_buffer())[: piece.num_bytes]
        piece.file.read_into(_bytes_of(buffer), piece.offset)
        values = buffer.view(piece.dtype).view(piece.shape)
        if is_on_cpu:
            piece.target.copy_(values[piece.cut])
            return
        # The whole piece crosses over in one copy; cutting and converting it is quick there.
        piece.target.copy_(values.to(piece.target.device, non_blocking=True)[piece.cut])
        # Of the target's device: this thread's current one may be another.
        self._copied[self._turn] = torch.accelerator.current_stream(piece.target.device).record_event()
        self._turn = 1 - self._turn

    def finish(self) -> None:
        """Wait for all copies."""
        for event in self._copied:
            if event is not None:
                event.synchronize()

    def _host_buffer(self) -> torch.Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        return self._buffer

    def _pinned_buffer(self) -> torch.Tensor:
        """One that no copy reads any more."""
        if not self._pinned:
            self._pinned = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        if (event := self._copied[self._turn]) is not None:
            event.synchronize()
        return self._pinned[self._turn]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on a CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data
