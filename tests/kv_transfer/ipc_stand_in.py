"""A GPU for the ipc transport that is none: memory from `allocate_shared`, handles that other processes can really map.

What peers map is read-only, as it is not on a GPU, so that a transport that writes to it is killed.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass, field

import numpy as np
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.ipc import IpcTransport
from atom_cluster.kv_transfer.ipc_copies import Batch
from atom_cluster.kv_transfer.ipc_device import Fence, SharedAllocation
from atom_cluster.kv_transfer.ipc_driver import HANDLE_BYTES
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.kv_transfer.shared_memory import SharedSpan, host_realm, locate, map_read_only

_HANDLE = struct.Struct("<5q")


@dataclass
class HostFence:
    """Copies are made when they are given, but may be held to be under way until `is_done`."""

    is_done: bool = True

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.is_done = True


@dataclass
class HostDevice:
    """An `IpcDevice`. What it was asked for can be read off, and how it answers be set."""

    uuid: str = "stand-in"
    holds: bool = False
    """New fences are not done before somebody says so."""
    refuses: str = ""
    """Error of the next copies."""
    is_lost: bool = False
    batches: list[Batch] = field(default_factory=list)
    fences: list[HostFence] = field(default_factory=list)
    mapped: dict[int, np.ndarray] = field(default_factory=dict)  # type: ignore[type-arg]
    num_maps: int = 0
    is_closed: bool = False

    def share(self, address: int) -> SharedAllocation:
        found = locate(torch.frombuffer((ctypes.c_ubyte * 1).from_address(address), dtype=torch.uint8))
        num_bytes = os.stat(f"/proc/self/fd/{found.fd}").st_size
        handle = _HANDLE.pack(found.pid, found.start_time, found.fd, found.inode, num_bytes).ljust(HANDLE_BYTES, b"\0")
        return SharedAllocation(handle, address - found.offset_bytes, num_bytes)

    def map(self, handle: bytes, owner_uuid: str) -> int:
        pid, start_time, fd, inode, num_bytes = _HANDLE.unpack(handle[: _HANDLE.size])
        if pid == os.getpid():
            raise TransferError("a process cannot open its own handles")
        span = SharedSpan(realm=host_realm(), pid=pid, start_time=start_time, fd=fd, inode=inode, offset_bytes=0)
        memory = np.frombuffer(map_read_only(span, num_bytes), dtype=np.uint8)
        address = int(memory.ctypes.data)
        self.mapped[address] = memory
        self.num_maps += 1
        return address

    def unmap(self, address: int) -> None:
        assert all(fence.is_done for fence in self.fences), "unmapped under copies that are under way"
        del self.mapped[address]

    def open_lane(self) -> HostDevice:
        return self

    def close(self) -> None:
        assert not self.mapped
        self.is_closed = True

    def copy(self, batch: Batch) -> None:
        self.batches.append(batch)
        if self.refuses:
            raise TransferError(self.refuses)
        for target, source, size in zip(batch.targets.tolist(), batch.sources.tolist(), batch.sizes.tolist()):
            ctypes.memmove(target, source, size)

    def fence(self) -> Fence:
        if self.is_lost:
            raise RuntimeError("an illegal memory access was encountered")
        fence = HostFence(is_done=not self.holds)
        self.fences = [*(one for one in self.fences if not one.is_done), fence]
        return fence


def open_stand_in(settings: TransportSettings) -> IpcTransport:
    """The transport over such a device."""
    return IpcTransport(rank=settings.rank, open_device=lambda _: HostDevice())
