"""Transport between GPUs of one host, or within one: a reader maps the peer's KV memory and has its device copy.

The exporter does nothing while it is read from; how a reader knows that the memory still is what was announced is told
in `ipc_export.py`. Copies go over NVLink, XGMI or PCIe, whatever the GPUs share, each peer's on a stream of its own.
Long runs of blocks are left to copy engines, scattered ones to a kernel (`block_copy.py`).

`poll` drives it all: it gives the device a bounded number of bytes at a time and asks, without waiting, what is done. A
copy that the device has cannot be called back. So a read that has to end, its deadline over or its peer gone, gets no
more of them, and completes when those under way are done: milliseconds. Only the reader writes, and only to its own
blocks; CUDA and HIP have no read-only mapping, so it is this file that keeps it so.

A peer that is a process killed in the middle: its reads fail, whatever the copies brought. What the driver does to the
mapping is in `ipc_driver.py`; if the device faults, `poll` raises, and the rank has to restart.

Ranks of one process need no handle, and cannot open their own: they read each other's memory as it is, on one GPU.
Knows nothing of tags, tickets or devices' work: the agent orders itself with that.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.ipc_copies import Batch, Ramp, Rows, batches
from atom_cluster.kv_transfer.ipc_device import Fence, IpcDevice, Lane, SharedAllocation, open_gpu
from atom_cluster.kv_transfer.ipc_driver import HANDLE_BYTES
from atom_cluster.kv_transfer.ipc_export import (
    ExportMark,
    IpcAllocation,
    IpcDescriptor,
    IpcRegion,
    SeenMark,
    decode,
    encode,
)
from atom_cluster.kv_transfer.pieces import PeerShape, Piece
from atom_cluster.kv_transfer.protocol import KvRegion, ReadCompletion
from atom_cluster.kv_transfer.regions import (
    RegionShape,
    byte_rows,
    check_peer,
    check_read,
    id_array,
    shape_of,
)
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.kv_transfer.shared_memory import name_in_realm
from atom_cluster.units import Deadline, KiB, MiB

_log = logging.getLogger(__name__)

_WINDOW_BYTES = 512 * MiB
"""Under way at once: more than a link carries between two polls of an agent (`pace`)."""
_KERNEL_BELOW_BYTES = 512 * KiB
"""What the kernel gains above (see `block_copy`) is not worth multiprocessors: beside products of matrices, which take
all of them, copy engines keep all of their rate, and a copying kernel a half or two thirds. Below, it is the host that
cannot give the engines their commands fast enough, one of which takes it half a microsecond or more."""
_FIRST_BLOCKS = 1024
_BLOCKS_AT_ONCE = 4096
"""Of a read are looked at before the device is given their copies: at first, and at most; each time twice as many as
before. So it begins soon, and with blocks of 64 KiB or more it has the next copies before it is done with these."""


@dataclass(frozen=True, slots=True)
class _OwnExport:
    """An export of this process, for readers in it."""

    device: str
    addresses: tuple[int, ...]
    """Of the allocations."""
    regions: tuple[KvRegion, ...]
    """Kept alive by those who read them."""


_OWN_EXPORTS: dict[bytes, _OwnExport] = {}
"""By descriptor."""


@dataclass(slots=True, eq=False)
class _Peer:
    """A peer's memory, mapped until `release` was called, which waits for its last read."""

    mark: SeenMark
    shapes: tuple[RegionShape, ...]
    rows: tuple[Rows, ...]
    lane: Lane
    release: Callable[[], None]
    is_forgotten: bool = False
    num_reads: int = 0


@dataclass(slots=True)
class _Read:
    """A read: what the device was not given yet, and the fences behind what it was."""

    read_id: int
    peer_name: str
    peer: _Peer
    todo: Iterator[Batch]
    deadline: Deadline
    num_bytes: int = 0
    """Done."""
    next_batch: Batch | None = None
    stop_reason: str | None = None
    under_way: deque[tuple[Fence, int]] = field(default_factory=deque)
    """With their bytes, in the order in which they will be done."""
    started_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.next_batch = next(self.todo, None)

    @property
    def wants_more(self) -> bool:
        return self.stop_reason is None and self.next_batch is not None

    @property
    def is_over(self) -> bool:
        return not self.under_way and not self.wants_more

    def retire(self) -> int:
        """Forget what is done: its bytes."""
        num_bytes = 0
        while self.under_way and self.under_way[0][0].query():
            num_bytes += self.under_way.popleft()[1]
        self.num_bytes += num_bytes
        return num_bytes

    def issue(self) -> int:
        """Give the device the next batch: its bytes. If it refuses, or the rest cannot be read, the read stops."""
        batch = self.next_batch
        assert batch is not None, "the read wants more"
        try:
            self.peer.lane.copy(batch)
        except TransferError as exc:
            self.stop_reason = str(exc)
        self.under_way.append((self.peer.lane.fence(), batch.num_bytes))
        try:
            self.next_batch = next(self.todo, None)
        except TransferError as exc:
            self.stop_reason = self.stop_reason or str(exc)
        return batch.num_bytes


class IpcTransport:
    """`KvTransport` over memory handles. Owns the mappings of its peers' memory and a stream per peer."""

    def __init__(
        self,
        *,
        rank: int,
        open_device: Callable[[torch.device], IpcDevice] = open_gpu,
        kernel_below_bytes: int = _KERNEL_BELOW_BYTES,
    ) -> None:
        """kernel_below_bytes: a read whose runs of adjacent blocks are shorter on average is copied by the kernel."""
        self.name = name_in_realm("ipc")
        self._rank = rank
        self._open_device = open_device
        self._kernel_below_bytes = kernel_below_bytes
        self._device: IpcDevice | None = None
        self._mappings: _Mappings | None = None
        self._mark: ExportMark | None = None
        self._descriptor = b""
        self._shapes: tuple[RegionShape, ...] = ()
        self._rows: tuple[Rows, ...] = ()
        self._peers: dict[str, _Peer] = {}
        self._reads: dict[int, _Read] = {}
        self._refused: list[ReadCompletion] = []
        self._num_bytes_under_way = 0

    def export(self, regions: tuple[KvRegion, ...]) -> bytes:
        """See `KvTransport`. Opens the device that the regions are on."""
        rows = [byte_rows(region) for region in regions]
        if len({row.device for row in rows}) != 1:
            raise TransferError("the regions are on several devices")
        self._device = device = self._open_device(rows[0].device)
        self._mappings = _Mappings(device)
        self._shapes = tuple(shape_of(region) for region in regions)
        self._rows = tuple(Rows(row.data_ptr(), row.stride(0)) for row in rows)
        shared: list[SharedAllocation] = []
        described = []
        for shape, own in zip(self._shapes, self._rows, strict=True):
            found = device.share(own.address)
            if found not in shared:
                shared.append(found)
            described.append(_describe(shape, own, found, shared.index(found)))
        self._mark = ExportMark()
        self._descriptor = encode(
            IpcDescriptor(
                rank=self._rank,
                device=device.uuid,
                mark=self._mark.span,
                allocations=tuple(IpcAllocation(handle=one.handle, num_bytes=one.num_bytes) for one in shared),
                regions=tuple(described),
            )
        )
        _OWN_EXPORTS[self._descriptor] = _OwnExport(device.uuid, tuple(one.address for one in shared), regions)
        self._mark.set(self._descriptor)
        return self._descriptor

    def connect(self, peer: str, descriptor: bytes, shape: PeerShape | None = None) -> None:
        """See `KvTransport`. Maps the peer's memory; the first of a GPU can take a moment."""
        if self._device is None or self._mappings is None:
            raise TransferError("export this rank's regions before connecting")
        if peer in self._peers:
            return
        remote = decode(descriptor, handle_bytes=HANDLE_BYTES)
        shapes = tuple(region.shape for region in remote.regions)
        check_peer(self._shapes, self._rank, shapes, remote.rank, shape)
        mark = SeenMark(remote.mark, descriptor)
        if mark.is_own_process:
            addresses, release = _addresses_here(descriptor, self._device)
        else:
            addresses, release = self._mappings.map(remote)
        rows = tuple(Rows(addresses[one.allocation] + one.offset_bytes, one.stride_bytes) for one in remote.regions)
        self._peers[peer] = _Peer(mark, shapes, rows, self._device.open_lane(), release)

    def start_read(
        self,
        read_id: int,
        peer: str,
        group: int,
        remote_blocks: tuple[int, ...],
        local_blocks: tuple[int, ...],
        deadline: Deadline,
        pieces: tuple[Piece, ...] | None = None,
    ) -> None:
        """See `KvTransport`. The next `poll` begins with it."""
        if read_id in self._reads:
            raise TransferError(f"read {read_id} is under way already")
        try:
            source = self._peers.get(peer)
            if source is None:
                raise TransferError(f"unknown peer {peer}")
            todo = self._planned(source, group, remote_blocks, local_blocks, pieces)
            read = _Read(read_id, peer, source, todo, deadline)
        except TransferError as exc:
            self._refused.append(ReadCompletion(read_id, str(exc), 0, 0.0))
            return
        source.num_reads += 1
        self._reads[read_id] = read

    def _planned(
        self,
        source: _Peer,
        group: int,
        remote_blocks: tuple[int, ...],
        local_blocks: tuple[int, ...],
        pieces: tuple[Piece, ...] | None,
    ) -> Iterator[Batch]:
        """The copies of a read. Raises `TransferError` for what cannot be read."""
        first, most, ramp = 0, _FIRST_BLOCKS, Ramp()
        while first < max(1, len(remote_blocks)):
            some = slice(first, first + most)
            first, most = some.stop, min(2 * most, _BLOCKS_AT_ONCE)
            remote, local = id_array(remote_blocks[some]), id_array(local_blocks[some])
            check_read(self._shapes, source.shapes, group, remote, local, pieces)
            yield from batches(
                remote,
                local,
                pieces,
                source=source.rows[group],
                target=self._rows[group],
                block_bytes=self._shapes[group].block_bytes,
                kernel_below_bytes=self._kernel_below_bytes,
                ramp=ramp,
            )

    def poll(self) -> list[ReadCompletion]:
        """See `KvTransport`. Gives the device what it is to copy next. Raises `TransferError` when it is lost."""
        try:
            self._advance()
        except RuntimeError as exc:
            raise TransferError(f"the device failed while it copied blocks: {exc}") from exc
        completions, self._refused = self._refused, []
        for read in [read for read in self._reads.values() if read.is_over]:
            completions.append(self._complete(read))
        return completions

    def disconnect(self, peer: str) -> None:
        """See `KvTransport`. Its memory is unmapped when the copies under way are done."""
        for read in self._reads.values():
            if read.peer_name == peer and read.stop_reason is None:
                read.stop_reason = "disconnected"
        self._forget(peer)

    def close(self) -> None:
        """See `KvTransport`. Waits for the copies under way."""
        for peer in tuple(self._peers):
            self.disconnect(peer)
        for read in tuple(self._reads.values()):
            try:
                for fence, _ in read.under_way:
                    fence.synchronize()
            except RuntimeError as exc:
                _log.warning("the device failed while it copied blocks of read %d: %s", read.read_id, exc)
            self._complete(read)
        if self._mark is not None:
            self._mark.wipe()
            self._mark = None
        _OWN_EXPORTS.pop(self._descriptor, None)
        if self._device is not None:
            self._device.close()
            self._device = None

    def _advance(self) -> None:
        """Look what is done and why reads have to stop; then fill the window, the oldest reads first."""
        defects = {read.peer: "" for read in self._reads.values()}
        for read in self._reads.values():
            self._num_bytes_under_way -= read.retire()
        # Behind what is done: a peer that was there before the copies could have gone meanwhile.
        for peer in defects:
            defects[peer] = peer.mark.defect() or ""
        for read in self._reads.values():
            if read.stop_reason is None:
                read.stop_reason = "the deadline passed" if read.deadline.has_passed else defects[read.peer] or None
            if defects[read.peer] and self._peers.get(read.peer_name) is read.peer:
                self._forget(read.peer_name)
        for read in self._reads.values():
            while read.wants_more and self._num_bytes_under_way < _WINDOW_BYTES:
                self._num_bytes_under_way += read.issue()

    def _complete(self, read: _Read) -> ReadCompletion:
        del self._reads[read.read_id]
        read.peer.num_reads -= 1
        if read.peer.is_forgotten and not read.peer.num_reads:
            read.peer.release()
        num_bytes = 0 if read.stop_reason is not None else read.num_bytes
        return ReadCompletion(read.read_id, read.stop_reason, num_bytes, time.monotonic() - read.started_s)

    def _forget(self, name: str) -> None:
        peer = self._peers.pop(name, None)
        if peer is not None:
            peer.is_forgotten = True
            if not peer.num_reads:
                peer.release()


class _Mappings:
    """Allocations of other processes that are mapped here, each once however many peers' regions lie in them."""

    def __init__(self, device: IpcDevice) -> None:
        self._device = device
        self._mapped: dict[tuple[int, int, bytes], list[int]] = {}
        """By process and handle: address, number of users."""

    def map(self, remote: IpcDescriptor) -> tuple[tuple[int, ...], Callable[[], None]]:
        """Addresses of the peer's allocations, and what to call when they are not needed any more."""
        keys = [(remote.mark.pid, remote.mark.start_time, one.handle) for one in remote.allocations]
        held: list[tuple[int, int, bytes]] = []
        try:
            for key in keys:
                if key not in self._mapped:
                    self._mapped[key] = [self._device.map(key[2], remote.device), 0]
                self._mapped[key][1] += 1
                held.append(key)
        except TransferError:
            self._release(held)
            raise
        return tuple(self._mapped[key][0] for key in keys), lambda: self._release(held)

    def _release(self, keys: list[tuple[int, int, bytes]]) -> None:
        while keys:
            key = keys.pop()
            self._mapped[key][1] -= 1
            if self._mapped[key][1] == 0:
                address, _ = self._mapped.pop(key)
                try:
                    self._device.unmap(address)
                except TransferError as exc:
                    _log.warning("a peer's memory stays mapped: %s", exc)


def open_transport(settings: TransportSettings) -> IpcTransport:
    """For the registry. Raises `TransferError` where there is no /proc."""
    try:
        return IpcTransport(rank=settings.rank)
    except OSError as exc:
        raise TransferError(f"ipc needs a Linux /proc: {exc}") from exc


def _describe(shape: RegionShape, rows: Rows, found: SharedAllocation, index: int) -> IpcRegion:
    offset = rows.address - found.address
    if offset < 0 or offset + (shape.num_blocks - 1) * rows.stride_bytes + shape.block_bytes > found.num_bytes:
        raise TransferError(f"region {shape.name} is not in one allocation of the driver: it cannot be shared")
    return IpcRegion(shape=shape, allocation=index, offset_bytes=offset, stride_bytes=rows.stride_bytes)


def _addresses_here(descriptor: bytes, device: IpcDevice) -> tuple[tuple[int, ...], Callable[[], None]]:
    """The same for a peer of this process; what is to be called keeps its memory."""
    export = _OWN_EXPORTS.get(descriptor)
    if export is None:
        raise TransferError("the peer, in this process, has withdrawn its memory")
    if export.device != device.uuid:
        raise TransferError("ranks of one process read each other's memory through ipc on one device only")
    kept = [export]
    return export.addresses, kept.clear
