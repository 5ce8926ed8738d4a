"""Transport between processes of one host whose KV memory is on the CPU: readers map it and copy.

The exporter does nothing while it is read from. Where the memory is, and why it is a memfd, is told in
`shared_memory.py`. A reader maps read-only and copies in threads of its own, with numpy, which lets go of the
interpreter lock and starts no further threads.

Its `name` carries a digest of the host realm (`shm@1f0c...`), so that two engines have it in common only if they can
really see each other's memory. Knows nothing of tags, tickets or devices.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import msgspec
import numpy as np
from msgspec import Struct

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.pieces import PeerShape, Piece
from atom_cluster.kv_transfer.protocol import KvRegion, ReadCompletion
from atom_cluster.kv_transfer.regions import (
    ByteArray,
    RegionShape,
    adjacent_runs,
    byte_rows,
    check_peer,
    check_read,
    extent_view,
    shape_of,
)
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.kv_transfer.shared_memory import (
    SharedSpan,
    locate,
    map_read_only,
    name_in_realm,
    process_start_time,
)
from atom_cluster.units import Deadline, MiB

_COPY_BYTES = 4 * MiB
"""Copied between two looks at the deadline: about a millisecond."""
_MAX_DESCRIPTOR_BYTES = 256 * 1024


class SharedRegion(Struct, frozen=True, kw_only=True):
    """One region of a peer and where its memory is."""

    shape: RegionShape
    span: SharedSpan
    stride_bytes: int
    """From one block to the next."""


class ShmDescriptor(Struct, frozen=True, kw_only=True):
    """What a rank announces; msgpack-encoded it is the descriptor."""

    rank: int
    regions: tuple[SharedRegion, ...]


@dataclass(frozen=True, slots=True)
class _Peer:
    """A peer's memory, mapped for as long as some array of `rows` is referenced."""

    pid: int
    start_time: int
    rows: tuple[ByteArray, ...]
    shapes: tuple[RegionShape, ...]

    def defect(self) -> str | None:
        """Why the memory must not be used any more, if so."""
        return None if process_start_time(self.pid) == self.start_time else f"process {self.pid} of the peer is gone"


@dataclass(slots=True)
class _Read:
    """A read on its way through the copy threads. `lock` decides who ends it: the thread, or whoever stops it first."""

    read_id: int
    peer_name: str
    peer: _Peer
    group: int
    remote_blocks: tuple[int, ...]
    local_blocks: tuple[int, ...]
    deadline: Deadline
    pieces: tuple[Piece, ...] | None
    started_s: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_copying: bool = False
    stop_reason: str | None = None

    def defect(self) -> str | None:
        """Why the read has to end now, if so."""
        return self.stop_reason or ("the deadline passed" if self.deadline.has_passed else None)


class ShmTransport:
    """`KvTransport` through shared memory. Owns `num_threads` copy threads and the mappings of its peers."""

    def __init__(self, *, rank: int, num_threads: int = 1) -> None:
        self.name = name_in_realm("shm")
        self._rank = rank
        self._rows: tuple[ByteArray, ...] = ()
        self._shapes: tuple[RegionShape, ...] = ()
        self._peers: dict[str, _Peer] = {}
        self._reads: dict[int, _Read] = {}
        self._completions: deque[ReadCompletion] = deque()
        self._queue: SimpleQueue[_Read | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._copy_reads, name=f"kv-shm-copy-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def export(self, regions: tuple[KvRegion, ...]) -> bytes:
        """See `KvTransport`. The regions must lie in memory from `shared_memory.allocate_shared`."""
        shared = []
        for region in regions:
            rows = byte_rows(region)
            shared.append(SharedRegion(shape=shape_of(region), span=locate(rows), stride_bytes=rows.stride(0)))
        descriptor = msgspec.msgpack.encode(ShmDescriptor(rank=self._rank, regions=tuple(shared)))
        if len(descriptor) > _MAX_DESCRIPTOR_BYTES:
            raise TransferError(f"{len(regions)} regions are too many to describe")
        _map_regions(shared)  # a system on which not even we can map it shall not be found out by the first reader
        self._rows = tuple(byte_rows(region).numpy() for region in regions)
        self._shapes = tuple(region.shape for region in shared)
        return descriptor

    def connect(self, peer: str, descriptor: bytes, shape: PeerShape | None = None) -> None:
        """See `KvTransport`. Maps the peer's memory."""
        if peer in self._peers:
            return
        if len(descriptor) > _MAX_DESCRIPTOR_BYTES:
            raise TransferError(f"shm descriptor of {len(descriptor)} bytes is too large")
        try:
            remote = msgspec.msgpack.decode(descriptor, type=ShmDescriptor)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise TransferError(f"not an shm descriptor: {exc}") from exc
        shapes = tuple(region.shape for region in remote.regions)
        check_peer(self._shapes, self._rank, shapes, remote.rank, shape)
        spans = [region.span for region in remote.regions]
        self._peers[peer] = _Peer(spans[0].pid, spans[0].start_time, _map_regions(remote.regions), shapes)

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
        """See `KvTransport`."""
        if read_id in self._reads:
            raise TransferError(f"read {read_id} is under way already")
        try:
            source = self._peers.get(peer)
            if source is None:
                raise TransferError(f"unknown peer {peer}")
            check_read(self._shapes, source.shapes, group, remote_blocks, local_blocks, pieces)
        except TransferError as exc:
            self._completions.append(ReadCompletion(read_id, str(exc), 0, 0.0))
            return
        read = _Read(read_id, peer, source, group, remote_blocks, local_blocks, deadline, pieces)
        self._reads[read_id] = read
        self._queue.put(read)

    def poll(self) -> list[ReadCompletion]:
        """See `KvTransport`. Forgets peers whose process turned out to be gone, so that their memory is freed."""
        for read in self._reads.values():
            if read.deadline.has_passed:
                self._stop(read, "the deadline passed")
        completions = []
        while self._completions:
            completion = self._completions.popleft()
            read_or_none = self._reads.pop(completion.read_id, None)
            if completion.error is not None and read_or_none is not None and read_or_none.peer.defect():
                self._peers.pop(read_or_none.peer_name, None)
            completions.append(completion)
        return completions

    def disconnect(self, peer: str) -> None:
        """See `KvTransport`. A read in progress stops before its next copy."""
        self._peers.pop(peer, None)
        for read in self._reads.values():
            if read.peer_name == peer:
                self._stop(read, "disconnected")

    def close(self) -> None:
        """See `KvTransport`. Waits for the copy in progress."""
        for peer in tuple(self._peers):
            self.disconnect(peer)
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        self._rows = ()

    def _stop(self, read: _Read, reason: str) -> None:
        """End a read: at once if no thread has begun with it, else as soon as the thread sees it."""
        with read.lock:
            if read.stop_reason is not None:
                return
            read.stop_reason = reason
            if not read.is_copying:
                self._complete(read, reason)

    def _complete(self, read: _Read, error: str | None, num_bytes: int = 0) -> None:
        self._completions.append(ReadCompletion(read.read_id, error, num_bytes, time.monotonic() - read.started_s))

    # --- copy threads ---------------------------------------------------------------------------------------------

    def _copy_reads(self) -> None:
        while (read := self._queue.get()) is not None:
            with read.lock:
                if read.stop_reason is not None:
                    continue
                read.is_copying = True
            self._copy(read)
            del read  # or the peer's memory would stay mapped until the next read

    def _copy(self, read: _Read) -> None:
        num_bytes = 0
        error = read.peer.defect()
        if error is None:
            for target, source in _copies(self._rows[read.group], read):
                error = read.defect()
                if error is not None:
                    break
                np.copyto(target, source)
                num_bytes += target.nbytes
            # A dead peer's pages are still there, but whoever sees it die must be able to rely on its reads failing.
            error = error or read.defect() or read.peer.defect()
        self._complete(read, error, num_bytes if error is None else 0)


def open_transport(settings: TransportSettings) -> ShmTransport:
    """For the registry. Raises `TransferError` where there is no /proc."""
    try:
        return ShmTransport(rank=settings.rank)
    except OSError as exc:
        raise TransferError(f"shared memory needs a Linux /proc: {exc}") from exc


def _map_regions(regions: Sequence[SharedRegion]) -> tuple[ByteArray, ...]:
    """uint8 [num_blocks, block_bytes] per region, read-only. Regions in one memfd share one mapping."""
    needed_bytes: dict[int, int] = {}
    for region in regions:
        shape, span = region.shape, region.span
        if (
            min(shape.num_blocks, shape.block_bytes, span.offset_bytes + 1) < 1
            or region.stride_bytes < shape.block_bytes
        ):
            raise TransferError(f"region {shape.name} of the peer has an impossible shape")
        end = span.offset_bytes + (shape.num_blocks - 1) * region.stride_bytes + shape.block_bytes
        needed_bytes[span.inode] = max(end, needed_bytes.get(span.inode, 0))
    bytes_by_inode: dict[int, ByteArray] = {}
    rows: list[ByteArray] = []
    for region in regions:
        shape, span = region.shape, region.span
        if span.inode not in bytes_by_inode:
            mapping = map_read_only(span, needed_bytes[span.inode])
            bytes_by_inode[span.inode] = np.frombuffer(mapping, dtype=np.uint8)
        memory = bytes_by_inode[span.inode][span.offset_bytes :]
        rows.append(
            np.lib.stride_tricks.as_strided(
                memory, (shape.num_blocks, shape.block_bytes), (region.stride_bytes, 1), writeable=False
            )
        )
    return tuple(rows)


def _copies(target: ByteArray, read: _Read) -> Iterator[tuple[ByteArray, ByteArray]]:
    """Target and source of every copy: blocks adjacent on both sides together, up to `_COPY_BYTES`."""
    source = read.peer.rows[read.group]
    max_blocks = max(1, _COPY_BYTES // max(target.shape[1], source.shape[1]))
    for start, length in adjacent_runs(read.remote_blocks, read.local_blocks, max_blocks=max_blocks):
        to, fro = read.local_blocks[start], read.remote_blocks[start]
        into, out_of = target[to : to + length], source[fro : fro + length]
        if read.pieces is None:
            yield into, out_of
            continue
        for piece in read.pieces:
            yield extent_view(into, piece.local), extent_view(out_of, piece.remote)
