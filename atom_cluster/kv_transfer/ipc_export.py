"""What a rank announces of its GPU memory to processes of its host, and how these see that it still holds.

A descriptor names allocations by their handles and says where the blocks lie in them. Beside it the exporter keeps a
page of shared memory, the mark, that has the descriptor's digest in it: written when the memory is exported, wiped when
that ends, gone with the process. So a reader that finds the digest of the descriptor it was given knows that not a bit
of it is wrong, that its writer is of the same user, and that this very export stands. Looking costs one short
system call, which asks whether that process still runs.

Knows numbers and shared memory, no GPU.
"""

from __future__ import annotations

import hashlib
import os
import select
import weakref
from collections.abc import Sequence

import msgspec
import torch
from msgspec import Struct

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.regions import RegionShape
from atom_cluster.kv_transfer.shared_memory import (
    SharedSpan,
    allocate_shared,
    locate,
    map_read_only,
    process_start_time,
)

_MAX_DESCRIPTOR_BYTES = 256 * 1024
_DIGEST_BYTES = 32


class IpcAllocation(Struct, frozen=True, kw_only=True):
    """One allocation of the driver; several regions may lie in it."""

    handle: bytes
    num_bytes: int


class IpcRegion(Struct, frozen=True, kw_only=True):
    """Where the blocks of one cache group are."""

    shape: RegionShape
    allocation: int
    """Index in the descriptor."""
    offset_bytes: int
    """Of block 0 within the allocation."""
    stride_bytes: int
    """From one block to the next."""


class IpcDescriptor(Struct, frozen=True, kw_only=True):
    """What a rank announces; msgpack-encoded it is the descriptor. Holds no secret."""

    rank: int
    device: str
    """UUID of the GPU."""
    mark: SharedSpan
    allocations: tuple[IpcAllocation, ...]
    regions: tuple[IpcRegion, ...]


class ExportMark:
    """The exporter's side of the mark."""

    def __init__(self) -> None:
        self._page = allocate_shared(_DIGEST_BYTES)
        self.span = locate(self._page)

    def set(self, descriptor: bytes) -> None:
        """This descriptor holds from now on."""
        self._page.copy_(torch.frombuffer(bytearray(_digest(descriptor)), dtype=torch.uint8))

    def wipe(self) -> None:
        """It does not hold any more."""
        self._page.zero_()


class _Process:
    """Another process, or this one. The first question is answered by /proc, later ones by a descriptor of the process.

    /proc takes tens of microseconds for a process of many threads.
    """

    def __init__(self, pid: int, start_time: int) -> None:
        self._pid, self._start_time = pid, start_time
        self._ended: select.poll | None = None
        try:
            fd = os.pidfd_open(pid)
        except OSError:  # gone; or the kernel is old, or a sandbox
            return
        weakref.finalize(self, os.close, fd)
        if self.is_running:  # so the descriptor is of the right one
            self._ended = select.poll()
            self._ended.register(fd, select.POLLIN)

    @property
    def is_running(self) -> bool:
        """False as soon as it only waits to be reaped."""
        if self._ended is not None:
            return not self._ended.poll(0)
        return process_start_time(self._pid) == self._start_time


class SeenMark:
    """The reader's side: mapped for as long as this object lives."""

    def __init__(self, span: SharedSpan, descriptor: bytes) -> None:
        """Raises `TransferError` when the mark is not to be seen from here, or is of another descriptor."""
        self._span = span
        self._digest = _digest(descriptor)
        self._process = _Process(span.pid, span.start_time)
        self._page = map_read_only(span, _DIGEST_BYTES)
        if reason := self.defect():
            raise TransferError(reason)

    @property
    def is_own_process(self) -> bool:
        """Whether the exporter is this process. The span was checked: the pid cannot be an earlier process's."""
        return self._span.pid == os.getpid()

    def defect(self) -> str | None:
        """Why the peer's memory must not be read any more, if so."""
        if not self._process.is_running:
            return f"process {self._span.pid} of the peer is gone"
        if self._page[:_DIGEST_BYTES] != self._digest:
            return "the peer has withdrawn its memory, or the descriptor is damaged"
        return None


def encode(descriptor: IpcDescriptor) -> bytes:
    """Raises `TransferError` when it gets too large."""
    encoded = msgspec.msgpack.encode(descriptor)
    if len(encoded) > _MAX_DESCRIPTOR_BYTES:
        raise TransferError(f"{len(descriptor.regions)} regions are too many to describe")
    return encoded


def decode(encoded: bytes, *, handle_bytes: int) -> IpcDescriptor:
    """A descriptor whose regions lie in its allocations. Raises `TransferError` for any other."""
    if len(encoded) > _MAX_DESCRIPTOR_BYTES:
        raise TransferError(f"ipc descriptor of {len(encoded)} bytes is too large")
    try:
        descriptor = msgspec.msgpack.decode(encoded, type=IpcDescriptor)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise TransferError(f"not an ipc descriptor: {exc}") from exc
    if any(len(allocation.handle) != handle_bytes for allocation in descriptor.allocations):
        raise TransferError(f"a handle of the peer has not {handle_bytes} bytes")
    for region in descriptor.regions:
        _check_region(region, descriptor.allocations)
    return descriptor


def _check_region(region: IpcRegion, allocations: Sequence[IpcAllocation]) -> None:
    shape = region.shape
    if not 0 <= region.allocation < len(allocations):
        raise TransferError(f"region {shape.name} of the peer is in no allocation")
    end = region.offset_bytes + (shape.num_blocks - 1) * region.stride_bytes + shape.block_bytes
    is_possible = min(shape.num_blocks, shape.block_bytes, region.offset_bytes + 1) >= 1
    if not is_possible or region.stride_bytes < shape.block_bytes or end > allocations[region.allocation].num_bytes:
        raise TransferError(f"region {shape.name} of the peer has an impossible shape")


def _digest(descriptor: bytes) -> bytes:
    return hashlib.blake2b(descriptor, digest_size=_DIGEST_BYTES).digest()
