"""One rank's KV memory as something sockets can send from and receive into: directly on a CPU, staged for a device.

Knows nothing of sockets, peers or frames. Blocks are asked for by cache group, whole or some extents of each; their
bytes come in the order asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from atom_cluster.kv_transfer.pieces import Extent
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.regions import (
    ByteArray,
    adjacent_runs,
    byte_rows,
    host_views,
    packed_bytes,
    packed_pairs,
)
from atom_cluster.units import MiB

VIEW_BYTES = MiB
"""No view is longer."""
_STAGE_BYTES = 8 * MiB


class Landing(Protocol):
    """Where the bytes of some blocks go."""

    def views(self) -> Iterator[memoryview]:
        """To be filled in this order."""
        ...

    def commit(self) -> None:
        """All views are filled: make the bytes the content of the blocks, before returning."""
        ...


class BlockMemory(Protocol):
    """Blocks of all cache groups of a rank. Used by one thread. Without extents, whole blocks are meant."""

    def outgoing(
        self, group: int, block_ids: Sequence[int], extents: Sequence[Extent] | None = None
    ) -> Iterator[list[memoryview]]:
        """Views of the blocks' bytes, in batches; the next batch is made when the last one has been sent."""
        ...

    def landing(self, group: int, block_ids: Sequence[int], extents: Sequence[Extent] | None = None) -> Landing:
        """A landing for these blocks; nothing is written to them before its views are."""
        ...


def block_memory(regions: Sequence[KvRegion]) -> BlockMemory:
    """The memory behind these regions, all on one device. Raises `TransferError` if they cannot be seen as bytes."""
    rows = [byte_rows(region) for region in regions]
    return _HostMemory(rows) if rows[0].device.type == "cpu" else _DeviceMemory(rows)


class _HostMemory:
    """Blocks in CPU memory: views are the blocks themselves, or a buffer that parts of them are put together in."""

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        self._rows = [region.numpy() for region in rows]

    def outgoing(
        self, group: int, block_ids: Sequence[int], extents: Sequence[Extent] | None = None
    ) -> Iterator[list[memoryview]]:
        """See `BlockMemory`. One batch of whole blocks."""
        if extents is None:
            yield list(self._views(group, block_ids))
            return
        for batch, num_bytes in _batches(block_ids, extents):
            stage = np.empty((len(batch), num_bytes), dtype=np.uint8)
            for memory, packed in packed_pairs(self._rows[group], batch, extents, stage):
                np.copyto(packed, memory)
            yield list(_split(stage))

    def landing(self, group: int, block_ids: Sequence[int], extents: Sequence[Extent] | None = None) -> Landing:
        """See `BlockMemory`."""
        if extents is None:
            return _HostLanding(self._views(group, block_ids))
        stage = np.empty((len(block_ids), packed_bytes(extents)), dtype=np.uint8)
        return _HostPartsLanding(self._rows[group], block_ids, extents, stage)

    def _views(self, group: int, block_ids: Sequence[int]) -> Iterator[memoryview]:
        return host_views(self._rows[group], block_ids, max_bytes=VIEW_BYTES)


@dataclass(frozen=True, slots=True)
class _HostLanding:
    block_views: Iterator[memoryview]

    def views(self) -> Iterator[memoryview]:
        return self.block_views

    def commit(self) -> None:
        """Nothing to do: the views are the blocks."""


@dataclass(frozen=True, slots=True)
class _HostPartsLanding:
    rows: ByteArray
    block_ids: Sequence[int]
    extents: Sequence[Extent]
    stage: ByteArray

    def views(self) -> Iterator[memoryview]:
        return _split(self.stage)

    def commit(self) -> None:
        for memory, packed in packed_pairs(self.rows, self.block_ids, self.extents, self.stage):
            np.copyto(memory, packed)


class _DeviceMemory:
    """Blocks in device memory: bytes pass through pinned host buffers, on a stream of their own."""

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        self._rows = rows
        self._stream = torch.Stream(rows[0].device)

    def outgoing(
        self, group: int, block_ids: Sequence[int], extents: Sequence[Extent] | None = None
    ) -> Iterator[list[memoryview]]:
        """See `BlockMemory`. A new buffer per batch, since the last one may still be on its way to the socket."""
        rows = self._rows[group]
        extents = _all_of(rows) if extents is None else extents
        for batch, num_bytes in _batches(block_ids, extents):
            stage = _pinned(len(batch), num_bytes)
            with self._stream:
                _gather(rows, batch, extents, stage)
            self._stream.synchronize()
            yield list(_split(stage.numpy()))

    def landing(self, group: int, block_ids: Sequence[int], extents: Sequence[Extent] | None = None) -> Landing:
        """See `BlockMemory`."""
        rows = self._rows[group]
        extents = _all_of(rows) if extents is None else extents
        return _DeviceLanding(rows, block_ids, extents, _pinned(len(block_ids), packed_bytes(extents)), self._stream)


@dataclass(frozen=True, slots=True)
class _DeviceLanding:
    rows: torch.Tensor
    block_ids: Sequence[int]
    extents: Sequence[Extent]
    stage: torch.Tensor
    stream: torch.Stream

    def views(self) -> Iterator[memoryview]:
        return _split(self.stage.numpy())

    def commit(self) -> None:
        with self.stream:
            _scatter(self.stage, self.rows, self.block_ids, self.extents)
        self.stream.synchronize()


def _all_of(rows: torch.Tensor) -> tuple[Extent, ...]:
    return (Extent(0, rows.shape[1]),)


def _batches(block_ids: Sequence[int], extents: Sequence[Extent]) -> Iterator[tuple[Sequence[int], int]]:
    """As many blocks at a time as fit into a buffer, at least one, and the bytes of each."""
    num_bytes = packed_bytes(extents)
    max_blocks = max(1, _STAGE_BYTES // num_bytes)
    for first in range(0, len(block_ids), max_blocks):
        yield block_ids[first : first + max_blocks], num_bytes


def _gather(rows: torch.Tensor, block_ids: Sequence[int], extents: Sequence[Extent], stage: torch.Tensor) -> None:
    """Copy these extents of blocks into `stage`, [blocks, bytes of all extents]."""
    for memory, packed in _pairs(rows, block_ids, extents, stage):
        packed.copy_(memory, non_blocking=True)


def _scatter(stage: torch.Tensor, rows: torch.Tensor, block_ids: Sequence[int], extents: Sequence[Extent]) -> None:
    """The other way round."""
    for memory, packed in _pairs(rows, block_ids, extents, stage):
        memory.copy_(packed, non_blocking=True)


def _pairs(
    rows: torch.Tensor, block_ids: Sequence[int], extents: Sequence[Extent], stage: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of equal shape [adjacent blocks, runs, bytes of a run], of the blocks and of the stage."""
    for start, length in adjacent_runs(block_ids, max_blocks=len(block_ids)):
        blocks, packed = rows[block_ids[start] : block_ids[start] + length], stage[start : start + length]
        offset = 0
        for extent in extents:
            yield (
                _runs(blocks, extent.offset, extent, extent.stride),
                _runs(packed, offset, extent, extent.num_bytes),
            )
            offset += extent.total_bytes


def _runs(rows: torch.Tensor, offset: int, extent: Extent, stride: int) -> torch.Tensor:
    shape = (rows.shape[0], extent.count, extent.num_bytes)
    return rows.as_strided(shape, (rows.stride(0), stride, 1), rows.storage_offset() + offset)


def _pinned(num_blocks: int, block_bytes: int) -> torch.Tensor:
    return torch.empty((num_blocks, block_bytes), dtype=torch.uint8, pin_memory=True)


def _split(stage: ByteArray) -> Iterator[memoryview]:
    view = stage.reshape(-1).data
    for offset in range(0, len(view), VIEW_BYTES):
        yield view[offset : offset + VIEW_BYTES]
