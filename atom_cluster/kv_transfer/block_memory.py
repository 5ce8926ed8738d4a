"""One rank's KV memory as something sockets can send from and receive into: directly on a CPU, staged for a device.

Knows nothing of sockets, peers or frames. Blocks are asked for by cache group; their bytes come in the order asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.regions import adjacent_runs, byte_rows, host_views
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
    """Blocks of all cache groups of a rank. Used by one thread."""

    def outgoing(self, group: int, block_ids: Sequence[int]) -> Iterator[list[memoryview]]:
        """Views of the blocks' bytes, in batches; the next batch is made when the last one has been sent."""
        ...

    def landing(self, group: int, block_ids: Sequence[int]) -> Landing:
        """A landing for these blocks; nothing is written to them before its views are."""
        ...


def block_memory(regions: Sequence[KvRegion]) -> BlockMemory:
    """The memory behind these regions, all on one device. Raises `TransferError` if they cannot be seen as bytes."""
    rows = [byte_rows(region) for region in regions]
    return _HostMemory(rows) if rows[0].device.type == "cpu" else _DeviceMemory(rows)


class _HostMemory:
    """Blocks in CPU memory: views are the blocks themselves."""

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        self._rows = [region.numpy() for region in rows]

    def outgoing(self, group: int, block_ids: Sequence[int]) -> Iterator[list[memoryview]]:
        """See `BlockMemory`. One batch."""
        yield list(self._views(group, block_ids))

    def landing(self, group: int, block_ids: Sequence[int]) -> Landing:
        """See `BlockMemory`."""
        return _HostLanding(self._views(group, block_ids))

    def _views(self, group: int, block_ids: Sequence[int]) -> Iterator[memoryview]:
        return host_views(self._rows[group], block_ids, max_bytes=VIEW_BYTES)


@dataclass(frozen=True, slots=True)
class _HostLanding:
    block_views: Iterator[memoryview]

    def views(self) -> Iterator[memoryview]:
        return self.block_views

    def commit(self) -> None:
        """Nothing to do: the views are the blocks."""


class _DeviceMemory:
    """Blocks in device memory: bytes pass through pinned host buffers, on a stream of their own."""

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        self._rows = rows
        self._stream = torch.Stream(rows[0].device)

    def outgoing(self, group: int, block_ids: Sequence[int]) -> Iterator[list[memoryview]]:
        """See `BlockMemory`. A new buffer per batch, since the last one may still be on its way to the socket."""
        rows = self._rows[group]
        max_blocks = max(1, _STAGE_BYTES // rows.shape[1])
        for first in range(0, len(block_ids), max_blocks):
            batch = block_ids[first : first + max_blocks]
            stage = _pinned(len(batch), rows.shape[1])
            with self._stream:
                for start, length in adjacent_runs(batch, max_blocks=max_blocks):
                    source = rows[batch[start] : batch[start] + length]
                    stage[start : start + length].copy_(source, non_blocking=True)
            self._stream.synchronize()
            yield list(_split(stage))

    def landing(self, group: int, block_ids: Sequence[int]) -> Landing:
        """See `BlockMemory`."""
        rows = self._rows[group]
        return _DeviceLanding(rows, block_ids, _pinned(len(block_ids), rows.shape[1]), self._stream)


@dataclass(frozen=True, slots=True)
class _DeviceLanding:
    rows: torch.Tensor
    block_ids: Sequence[int]
    stage: torch.Tensor
    stream: torch.Stream

    def views(self) -> Iterator[memoryview]:
        return _split(self.stage)

    def commit(self) -> None:
        with self.stream:
            for start, length in adjacent_runs(self.block_ids, max_blocks=len(self.block_ids)):
                target = self.rows[self.block_ids[start] : self.block_ids[start] + length]
                target.copy_(self.stage[start : start + length], non_blocking=True)
        self.stream.synchronize()


def _pinned(num_blocks: int, block_bytes: int) -> torch.Tensor:
    return torch.empty((num_blocks, block_bytes), dtype=torch.uint8, pin_memory=True)


def _split(stage: torch.Tensor) -> Iterator[memoryview]:
    view = stage.reshape(-1).numpy().data
    for offset in range(0, len(view), VIEW_BYTES):
        yield view[offset : offset + VIEW_BYTES]
