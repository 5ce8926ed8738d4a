"""Transport over MORI-IO: RDMA between hosts, copies between the GPUs of one host. For ROCm; decode reads.

What MORI-IO is like, and what that asks of us, is told in `mori_engine.py`; how a read is cut into transfers, in
`mori_plan.py`. This file decides when a read has ended:

- A read is over when each of its transfers succeeded. One that failed, or that is still under way half a second after
  its read's deadline or its peer's disconnection, ends with the engine that reads: the engine is closed, and only then
  is the read completed, since MORI cannot cancel. Nothing is written to its blocks afterwards.
- Reads from other peers that were under way in that engine start again in the next one, within their own deadlines.
- A read from a peer that was not opened yet has issued nothing; at its deadline it is completed at once.

What it cannot keep: whoever reaches the ports of MORI's engines may read and write the KV memory. So `auto` does not
take this transport, and whoever names it has to trust the network between the hosts.

Its `name` is `mori` where there is a NIC, and `mori@<host realm>` where only GPUs of one host reach each other.
Knows nothing of tags or tickets.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from types import ModuleType

import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.mori_descriptor import DescriptorSeal, MoriDescriptor, MoriRegion
from atom_cluster.kv_transfer.mori_engine import (
    IDENTITY_BYTES,
    MoriEngine,
    ReadingEngine,
    RemoteRank,
    Span,
    Transfer,
    load_mori_io,
    parse_rank,
    span_of,
)
from atom_cluster.kv_transfer.mori_plan import Batch, ChunkLayout, lay_out, plan_batches
from atom_cluster.kv_transfer.mori_reader import Reader
from atom_cluster.kv_transfer.pieces import PeerShape, Piece
from atom_cluster.kv_transfer.protocol import KvRegion, ReadCompletion
from atom_cluster.kv_transfer.regions import RegionShape, byte_rows, check_peer, check_read, shape_of
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.kv_transfer.shared_memory import host_realm, name_in_realm, process_start_time
from atom_cluster.platform.detect import detect_platform
from atom_cluster.units import Deadline

_log = logging.getLogger(__name__)

_MAX_TRANSFERS_PER_READ = 4
_MAX_TRANSFERS_PER_PEER = 32
"""Together at most 16,384 operations, in four queue pairs that hold 8192 each."""
_DRAIN_S = 0.5
"""Transfers of a read that has to end may take this long to end by themselves."""
_MAX_FAILURES, _FAILURE_WINDOW_S = 2, 2.0
"""A peer that failed this often within this time is left alone for the rest of it: its failures cost an engine each,
and reads from other peers start again."""


@dataclass(slots=True)
class _Peer:
    rank: RemoteRank
    shapes: tuple[RegionShape, ...]
    pid: int | None
    """None on another host."""
    start_time: int
    failures_s: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_FAILURES))
    """When it last failed in a way that only another engine may mend."""
    is_suspect: bool = False
    """Whether it ever failed."""

    def defect(self) -> str | None:
        """Why the peer must not be read from any more, if that can be seen from here."""
        if self.pid is None or process_start_time(self.pid) == self.start_time:
            return None
        return f"process {self.pid} of the peer is gone"

    def note_failure(self) -> None:
        self.failures_s.append(time.monotonic())
        self.is_suspect = True

    @property
    def is_suspended(self) -> bool:
        return len(self.failures_s) == _MAX_FAILURES and time.monotonic() < self.failures_s[0] + _FAILURE_WINDOW_S


@dataclass(slots=True)
class _Read:
    """A read on its way. While `is_held`, it waits for its engine to be closed, and nobody looks at its transfers."""

    read_id: int
    peer_name: str
    peer: _Peer
    group: int
    deadline: Deadline
    waiting: deque[Batch]
    under_way: list[Transfer] = field(default_factory=list)
    num_bytes: int = 0
    error: str | None = None
    drain: Deadline | None = None
    """With an error: when to stop waiting for what is under way."""
    is_in_doubt: bool = False
    """Whether MORI may be writing for this read although no transfer under way says so."""
    is_held: bool = False
    started_s: float = field(default_factory=time.monotonic)

    def end(self, error: str, drain_s: float = _DRAIN_S) -> None:
        """Issue no more; the first error counts, the shortest patience too."""
        self.error = self.error or error
        drain = Deadline.after(drain_s)
        self.drain = drain if self.drain is None or drain.at_s < self.drain.at_s else self.drain


class MoriTransport:
    """`KvTransport` over MORI-IO. Owns an engine that lends this rank's memory and a `Reader` that reads from peers.

    All but opening and closing engines happens in `poll`. Memory on CPUs is moved too, by NICs; on GPUs the order with
    the device's work is the caller's.
    """

    def __init__(self, io: ModuleType, *, rank: int, host: str, secret: bytes) -> None:
        """io: `mori.io`. Raises `TransferError` for a secret under 16 bytes and where a `MoriEngine` cannot be made."""
        self._seal = DescriptorSeal(secret)
        self._io = io
        self._rank = rank
        self._host = host
        self._lender = MoriEngine(io, key=self._key("lends"), host=host)
        self.name = "mori" if self._lender.has_nic else name_in_realm("mori")
        self._identity = torch.empty(0, dtype=torch.uint8)
        self._spans: list[list[Span]] = []
        self._layouts: list[ChunkLayout] = []
        self._shapes: list[RegionShape] = []
        self._peers: dict[str, _Peer] = {}
        self._reads: dict[int, _Read] = {}
        self._completions: list[ReadCompletion] = []
        self._reader: Reader | None = None
        self._retired: list[tuple[Reader, list[_Read]]] = []

    def export(self, regions: tuple[KvRegion, ...]) -> bytes:
        """See `KvTransport`. Regions of more than 2 GiB are registered in pieces of whole blocks."""
        described = []
        for region in regions:
            rows = byte_rows(region)
            if rows.device.type == "cpu" and not self._lender.has_nic:
                raise TransferError("MORI-IO needs an RDMA NIC for memory that is not a GPU's")
            shape, stride = shape_of(region), rows.stride(0)
            layout = lay_out(num_blocks=rows.shape[0], block_bytes=rows.shape[1], stride_bytes=stride)
            whole = span_of(rows)
            spans = [
                Span(whole.address + layout.chunk_start(chunk), layout.chunk_bytes(chunk), whole.device)
                for chunk in range(layout.num_chunks)
            ]
            chunks = tuple(bytes(self._lender.register(span).pack()) for span in spans)
            described.append(
                MoriRegion(shape=shape, stride_bytes=stride, blocks_per_chunk=layout.blocks_per_chunk, chunks=chunks)
            )
            self._shapes.append(shape)
            self._layouts.append(layout)
            self._spans.append(spans)
        identity_bytes = secrets.token_bytes(IDENTITY_BYTES)
        self._identity = torch.tensor([list(identity_bytes)], dtype=torch.uint8, device=regions[0].blocks.device)
        return self._seal.seal(
            MoriDescriptor(
                rank=self._rank,
                realm=host_realm(),
                pid=os.getpid(),
                start_time=process_start_time(os.getpid()) or 0,
                engine=self._lender.describe(),
                identity=bytes(self._lender.register(span_of(self._identity)).pack()),
                identity_bytes=identity_bytes,
                regions=tuple(described),
            )
        )

    def connect(self, peer: str, descriptor: bytes, shape: PeerShape | None = None) -> None:
        """See `KvTransport`. Whether the peer can be reached is told by reads."""
        if not self._shapes:
            raise TransferError("export this rank's regions before connecting")
        if peer in self._peers:
            return
        remote = self._seal.open(descriptor)
        shapes = tuple(region.shape for region in remote.regions)
        check_peer(self._shapes, self._rank, shapes, remote.rank, shape)
        rank = parse_rank(
            self._io,
            engine=remote.engine,
            identity=remote.identity,
            identity_bytes=remote.identity_bytes,
            chunks=[region.chunks for region in remote.regions],
            layouts=[region.layout() for region in remote.regions],
        )
        found = _Peer(rank, shapes, remote.pid if remote.realm == host_realm() else None, remote.start_time)
        if (defect := found.defect()) is not None:
            raise TransferError(defect)
        self._peers[peer] = found

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
        batches = plan_batches(
            self._layouts[group],
            source.rank.layouts[group],
            remote_blocks=remote_blocks,
            local_blocks=local_blocks,
            pieces=pieces,
        )
        self._reads[read_id] = _Read(read_id, peer, source, group, deadline, deque(batches))

    def poll(self) -> list[ReadCompletion]:
        """See `KvTransport`. Raises `TransferError` if an engine could not be closed."""
        self._take_back()
        self._notice_failures()
        for read in tuple(self._reads.values()):
            if not read.is_held:
                self._advance(read)
        completions, self._completions = self._completions, []
        return completions

    def disconnect(self, peer: str) -> None:
        """See `KvTransport`."""
        gone = self._peers.pop(peer, None)
        if gone is None:
            return
        for read in self._reads.values():
            if read.peer_name == peer:
                read.end("disconnected")
        if self._reader is not None:
            self._reader.openings.pop(peer, None)
            is_shared = any(other.rank.key == gone.rank.key for other in self._peers.values())
            if self._reader.engine is not None and not is_shared:
                self._reader.engine.forget(gone.rank)

    def close(self) -> None:
        """See `KvTransport`. Waits for the engines, openings included: a few seconds if a peer does not answer."""
        for peer in tuple(self._peers):
            self.disconnect(peer)
        self._retire()
        for reader, _ in self._retired:
            reader.join()
        self._retired.clear()
        self._reads.clear()
        self._lender.close()

    # --- reads ----------------------------------------------------------------------------------------------------

    def _advance(self, read: _Read) -> None:
        """Look at what is under way, issue more, and end the read if it is time."""
        self._look_at_transfers(read)
        if read.error is None and read.deadline.has_passed:
            read.end("the deadline passed")
        if read.error is None and not read.waiting and not read.under_way:
            if (defect := read.peer.defect()) is None:
                self._complete(read)
                return
            read.end(defect)
        if read.error is None:
            self._issue(read)
        if read.drain is not None:
            if not read.under_way and not read.is_in_doubt:
                self._complete(read)
            elif read.drain.has_passed:
                _log.warning("read %d ends with the MORI-IO engine: %s", read.read_id, read.error)
                read.peer.note_failure()
                self._retire()

    def _look_at_transfers(self, read: _Read) -> None:
        """A transfer that failed stays under way: parts of it may still be writing."""
        for transfer in tuple(read.under_way):
            state = transfer.state()
            if state == "succeeded":
                read.under_way.remove(transfer)
                read.num_bytes += transfer.batch.num_bytes
                self._engine().finish(transfer)
            elif state == "failed":
                read.end(transfer.message(), drain_s=0)

    def _issue(self, read: _Read) -> None:
        """Start transfers if the peer is open and there is room; else see that it gets opened, or end the read."""
        if read.peer.is_suspended and not read.under_way:
            read.end(f"the peer failed {_MAX_FAILURES} times within {_FAILURE_WINDOW_S} s")
            return
        if self._reader is None:
            self._reader = Reader(self._make_engine)
        reader, opening = self._reader, self._reader.openings.get(read.peer_name)
        if opening is not None and opening.has_failed and opening.ended_s < read.started_s:
            # That was told to reads before this one; it gets an attempt of its own.
            if reader.is_broken(read.peer.rank):
                self._retire()
                return
            read.peer.is_suspect, opening = True, None
        if opening is None:
            if reader.is_used_up:
                self._retire()
            else:
                reader.open(read.peer_name, read.peer.rank, is_suspect=read.peer.is_suspect)
        elif opening.has_failed:
            if reader.is_broken(read.peer.rank) and not opening.is_counted:
                opening.is_counted = True
                read.peer.note_failure()
            read.end(opening.error or "")
        elif opening.is_ended:
            self._start_transfers(read)

    def _start_transfers(self, read: _Read) -> None:
        if not read.waiting:
            return
        room = _MAX_TRANSFERS_PER_PEER - sum(
            len(other.under_way)
            for other in self._reads.values()
            if other.peer_name == read.peer_name and not other.is_held
        )
        room = min(room, _MAX_TRANSFERS_PER_READ - len(read.under_way))
        while room > 0 and read.waiting:
            room -= 1
            try:
                read.under_way.append(self._engine().start(read.peer.rank, read.group, read.waiting[0]))
                read.waiting.popleft()
            except TransferError as exc:
                read.is_in_doubt = True
                read.end(str(exc), drain_s=0)
                return

    def _complete(self, read: _Read) -> None:
        del self._reads[read.read_id]
        num_bytes = read.num_bytes if read.error is None else 0
        seconds = time.monotonic() - read.started_s
        self._completions.append(ReadCompletion(read.read_id, read.error, num_bytes, seconds))

    # --- engines --------------------------------------------------------------------------------------------------

    def _engine(self) -> ReadingEngine:
        assert self._reader is not None and self._reader.engine is not None
        return self._reader.engine

    def _make_engine(self) -> ReadingEngine:
        """In an opener's thread."""
        return ReadingEngine(
            self._io, key=self._key("reads"), host=self._host, regions=self._spans, layouts=self._layouts
        )

    def _key(self, purpose: str) -> str:
        return f"atom_cluster:{self._host}:{os.getpid()}:{self._rank}:{purpose}"

    def _retire(self) -> None:
        """Give up the reading engine; what is under way in it is held until it has closed."""
        reader, self._reader = self._reader, None
        if reader is None:
            return
        held = [read for read in self._reads.values() if not read.is_held and (read.under_way or read.is_in_doubt)]
        for read in held:
            read.is_held = True
        self._retired.append((reader, held))
        reader.close()

    def _take_back(self) -> None:
        """Let reads go on whose engine has closed: with what was not finished, or to their end."""
        for reader, held in tuple(self._retired):
            if not reader.has_closed:
                continue
            if reader.failure is not None:
                raise TransferError(f"a MORI-IO engine could not be closed: {reader.failure}") from reader.failure
            self._retired.remove((reader, held))
            for read in held:
                read.waiting.extendleft(transfer.batch for transfer in read.under_way)
                read.under_way.clear()
                read.is_in_doubt = read.is_held = False

    def _notice_failures(self) -> None:
        """End what was to come from peers that MORI says have failed, without waiting for deadlines."""
        if self._reader is None or self._reader.engine is None:
            return
        for key, event in self._reader.engine.take_failures():
            for opening in self._reader.openings.values():
                if key in ("", opening.peer.key) and opening.is_ended and opening.error is None:
                    opening.fail(event)
            for read in self._reads.values():
                if key in ("", read.peer.rank.key) and not read.is_held:
                    read.end(event, drain_s=0)


def open_transport(settings: TransportSettings) -> MoriTransport:
    """For the registry. Raises `TransferError` if it was not named, and without ROCm, amd-mori or something to use."""
    if not settings.is_named:
        raise TransferError("has to be asked for by name, on a network to be trusted: MORI-IO lets anybody in")
    if detect_platform().vendor == "cuda":
        raise TransferError("MORI-IO needs ROCm; the GPUs here are of CUDA")
    return MoriTransport(load_mori_io(), rank=settings.rank, host=settings.host, secret=settings.secret)
