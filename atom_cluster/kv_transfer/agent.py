"""KvAgent: executes an engine's KV commands on one rank, in a thread of its own, so that computing never waits for it.

It connects and reads through the transports, tags blocks for peers, and checks the tags of all it read before the
engine hears that the read is over. A `ReadBlocks` may take several reads of a transport, from several ranks of the peer
if that lays out its KV differently (`routes`). It ends in exactly one report, when all of them have ended, within its
timeout and a short grace; a transport that breaks this promise ends the agent, since nobody could tell when it stops
writing to blocks.

Knows nothing of requests, tickets' owners or other ranks; `ReportCombiner` merges the reports of all ranks.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_cache.page_map import PageMap
from atom_cluster.kv_transfer import registry
from atom_cluster.kv_transfer.checksum import BlockTagger
from atom_cluster.kv_transfer.combine import ReportCombiner, merge_offers
from atom_cluster.kv_transfer.pace import PollPace
from atom_cluster.kv_transfer.pieces import PeerShape
from atom_cluster.kv_transfer.protocol import KvRegion, KvTransport, ReadCompletion
from atom_cluster.kv_transfer.reads import Part, parts_of_read, tags_for_reader
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.kv_transfer.routes import RoutePlanner, check_placement
from atom_cluster.messages.transfer import (
    BlocksTagged,
    ConnectPeer,
    DropPeer,
    KvCommand,
    KvOffer,
    KvPlacement,
    KvReport,
    RankReport,
    ReadBlocks,
    ReadFinished,
    TagBlocks,
)
from atom_cluster.platform.timers import wake_on_time
from atom_cluster.units import Deadline

__all__ = ["KvAgent", "ReportCombiner", "merge_offers", "open_agent"]

_log = logging.getLogger(__name__)

_IDLE_POLL_S = 1.0
_GRACE_S = 5.0
"""A transport may end a read this long after its deadline (a copy in progress is not torn off)."""


@dataclass(frozen=True, slots=True)
class _Order:
    """A command as it was given: when, and after which device work."""

    command: KvCommand
    issued_s: float
    after: torch.Event | None

    @property
    def is_ready(self) -> bool:
        return self.after is None or self.after.query()

    @property
    def has_expired(self) -> bool:
        return isinstance(self.command, ReadBlocks) and time.monotonic() >= self.issued_s + self.command.timeout_s


@dataclass(slots=True)
class _Read:
    """A read whose parts were handed to a transport."""

    command: ReadBlocks
    issued_s: float
    deadline: Deadline
    parts: list[Part]
    num_open: int
    """Parts under way."""
    num_bytes: int = 0
    error: str | None = None
    """Of the first part that failed."""


@dataclass(frozen=True, slots=True)
class _Peer:
    """A peer that can be read from, or why it cannot."""

    placement: KvPlacement
    transport: KvTransport | None
    sources: tuple[int, ...] = ()
    """Its ranks that this one reads from."""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFacts:
    """What the bytes of this rank's pages mean."""

    maps: tuple[PageMap, ...]
    """By cache group."""
    placement: KvPlacement
    """Of this engine."""


class KvAgent:
    """One rank's KV transfers. Owns the transports and a thread; `execute` and `poll` never block.

    `execute` is to be called from the thread that issues the forward passes, before those of the same plan: on a
    device, reads wait for the work issued before them, which may still write to the blocks of a request that has ended.
    Checksums wait for nothing: the engine asks for those of blocks whose step has given it its result.
    """

    def __init__(
        self,
        *,
        rank: int,
        regions: Sequence[KvRegion],
        pages: PageFacts,
        exports: Sequence[tuple[KvTransport, bytes]],
    ) -> None:
        """`exports`: transports, best first, each with what its `export` of these regions returned.

        Owns the transports from here on, unless it raises `TransferError` because these regions cannot be tagged.
        """
        self._rank = rank
        self._device = regions[0].blocks.device
        self._placement = pages.placement
        self._maps = pages.maps
        self._planner = RoutePlanner(pages.maps)
        self._tagger = BlockTagger(regions)
        self._transports = {transport.name: transport for transport, _ in exports}
        self.descriptors: Mapping[str, bytes] = {transport.name: descriptor for transport, descriptor in exports}
        """How peers reach this rank's memory, by transport name, best first. For `merge_offers`."""
        self._peers: dict[str, _Peer] = {}
        self._reads: dict[int, _Read] = {}
        """By the engine's read id."""
        self._read_by_part: dict[int, _Read] = {}
        """By the transport's read id."""
        self._num_parts = 0
        self._waiting: deque[_Order] = deque()
        self._pace = PollPace()
        self._inbox: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._reports: deque[RankReport] = deque()
        self._failure: Exception | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._main, name=f"kv-agent-{rank}", daemon=True)
        self._thread.start()

    @property
    def transports(self) -> tuple[str, ...]:
        """Names of the transports this rank exports and reads through, best first."""
        return tuple(self._transports)

    def execute(self, commands: Iterable[KvCommand]) -> None:
        """Queue commands; they are carried out in order. Raises `TransferError` if the agent has failed."""
        self._check_alive()
        after: torch.Event | None = None
        for command in commands:
            if after is None and self._device.type == "cuda" and isinstance(command, ReadBlocks):
                after = torch.accelerator.current_stream(self._device).record_event()
            self._inbox.put(_Order(command, time.monotonic(), after))

    def poll(self) -> list[RankReport]:
        """Reports since the last call. Raises `TransferError` if the agent has failed; the rank must then restart."""
        self._check_alive()
        reports = []
        while self._reports:
            reports.append(self._reports.popleft())
        return reports

    def close(self) -> None:
        """Stop, abandon reads under way, close the transports. No block is written to afterwards. Idempotent."""
        self._is_closing = True
        self._inbox.put(None)
        self._thread.join()

    # --- the agent's thread ---------------------------------------------------------------------------------------

    def _main(self) -> None:
        """Supervisor of the thread: whatever goes wrong is logged here and raised again to the owner by `poll`."""
        try:
            wake_on_time()
            # A side stream, so that tagging does not queue behind forward passes.
            with torch.Stream(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
                while not self._is_closing:
                    self._receive()
                    self._execute_ready()
                    self._collect()
        except Exception as exc:  # noqa: BLE001 a supervisor
            _log.exception("the KV agent of rank %d failed", self._rank)
            self._failure = exc
        finally:
            self._close_transports()

    def _receive(self) -> None:
        """Take what is in the inbox, waiting a moment if there is nothing."""
        timeout_s = self._pace.pause_s if self._reads or self._waiting else _IDLE_POLL_S
        try:
            order = self._inbox.get(timeout=timeout_s)
            while order is not None:
                self._waiting.append(order)
                self._pace.restart()
                order = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _execute_ready(self) -> None:
        while self._waiting and self._waiting[0].is_ready:
            order = self._waiting.popleft()
            self._pace.restart()
            command = order.command
            if isinstance(command, ReadBlocks):
                self._start_read(command, order.issued_s)
            elif isinstance(command, TagBlocks):
                self._tag(command)
            elif isinstance(command, ConnectPeer):
                self._connect(command)
            else:
                self._drop(command)
        for order in [order for order in self._waiting if order.has_expired]:
            self._waiting.remove(order)
            assert isinstance(order.command, ReadBlocks)
            self._fail(order.command, order.issued_s, "the deadline passed before the device was ready for the read")

    def _tag(self, command: TagBlocks) -> None:
        tags = tags_for_reader(command, self._planner, self._tagger, own=self._placement, rank=self._rank)
        self._report(
            BlocksTagged(ticket_id=command.ticket_id, first_block=command.first_block, tags=tags, group=command.group)
        )

    def _connect(self, command: ConnectPeer) -> None:
        """A failure is not an error here: it is told by the reads from this peer."""
        known = self._peers.get(command.peer)
        if known is not None and known.transport is not None:
            return
        errors = []
        for offer in (KvOffer(command.transport, command.descriptors), *command.others):
            peer = self._connect_through(offer, command)
            self._peers[command.peer] = peer
            if peer.transport is not None:
                break
            errors.append(peer.error)
            _log.warning(
                "rank %d cannot read from %s through %s: %s", self._rank, command.peer, offer.transport, peer.error
            )
        else:
            self._peers[command.peer] = _Peer(command.placement, None, error=f"cannot connect: {'; '.join(errors)}")

    def _connect_through(self, offer: KvOffer, command: ConnectPeer) -> _Peer:
        """The peer connected through this transport, or why it cannot be."""
        transport = self._transports.get(offer.transport)
        connected: list[str] = []
        try:
            if transport is None:
                raise TransferError(f"no transport {offer.transport!r} here; there are {', '.join(self._transports)}")
            sources = self._sources(command, len(offer.descriptors))
            for source in sources:
                shape = None if command.placement == self._placement else self._shape(source, command.placement)
                connected.append(_rank_name(command.peer, source))
                transport.connect(connected[-1], offer.descriptors[source], shape)
        except TransferError as exc:
            if transport is not None:
                for name in connected:
                    transport.disconnect(name)
            return _Peer(command.placement, None, error=str(exc))
        return _Peer(command.placement, transport, sources)

    def _sources(self, command: ConnectPeer, num_descriptors: int) -> tuple[int, ...]:
        """Ranks of a peer to read from. Raises `TransferError` if it has not told how to reach them."""
        check_placement(command.placement, self._placement)
        if num_descriptors != command.placement.world_size:
            raise TransferError(f"{num_descriptors} descriptors of {command.placement.world_size} ranks")
        sources = {
            route.source
            for group in range(len(self._maps))
            for route in self._planner.routes(group, source=command.placement, reader=self._placement, rank=self._rank)
        }
        return tuple(sorted(sources))

    def _shape(self, source: int, placement: KvPlacement) -> PeerShape:
        sizes = (pages.page_bytes(source, placement.world_size, placement.block_size) for pages in self._maps)
        return PeerShape(source, tuple(sizes))

    def _drop(self, command: DropPeer) -> None:
        peer = self._peers.pop(command.peer, None)
        if peer is not None and peer.transport is not None:
            for source in peer.sources:
                peer.transport.disconnect(_rank_name(command.peer, source))

    def _start_read(self, command: ReadBlocks, issued_s: float) -> None:
        if command.read_id in self._reads:
            raise TransferError(f"read {command.read_id} was started twice")
        peer = self._peers.get(command.peer, _Peer(self._placement, None, error="unknown peer"))
        try:
            if peer.transport is None:
                raise TransferError(peer.error)
            parts = parts_of_read(command, self._planner, source=peer.placement, own=self._placement, rank=self._rank)
        except TransferError as exc:
            self._fail(command, issued_s, str(exc))
            return
        deadline = Deadline(issued_s + command.timeout_s)
        read = self._reads[command.read_id] = _Read(command, issued_s, deadline, parts, len(parts))
        for part in parts:
            self._num_parts += 1
            self._read_by_part[self._num_parts] = read
            name = _rank_name(command.peer, part.source)
            peer.transport.start_read(
                self._num_parts, name, command.group, part.remote_blocks, part.local_blocks, deadline, part.pieces
            )
        if not parts:
            self._end(read)

    def _collect(self) -> None:
        for transport in self._transports.values():
            for completion in transport.poll():
                self._finish(completion)
        for read in self._reads.values():
            if time.monotonic() > read.deadline.at_s + _GRACE_S:
                raise TransferError(f"read {read.command.read_id} did not end within {_GRACE_S} s of its deadline")

    def _finish(self, completion: ReadCompletion) -> None:
        read = self._read_by_part.pop(completion.read_id, None)
        if read is None:
            raise TransferError(f"a transport ended read {completion.read_id}, which is not under way")
        self._pace.restart()
        read.num_open -= 1
        read.num_bytes += completion.num_bytes
        read.error = read.error or completion.error
        if not read.num_open:
            self._end(read)

    def _end(self, read: _Read) -> None:
        del self._reads[read.command.read_id]
        if read.error is not None:
            self._fail(read.command, read.issued_s, read.error)
            return
        self._report(
            ReadFinished(
                read_id=read.command.read_id,
                bad_blocks=self._bad_blocks(read),
                num_bytes=read.num_bytes,
                seconds=time.monotonic() - read.issued_s,
                transport=self._transport_to(read.command.peer),
            )
        )

    def _bad_blocks(self, read: _Read) -> tuple[int, ...]:
        bad: set[int] = set()
        for part in read.parts:
            if part.tags:
                found = self._tagger.tags(read.command.group, part.local_blocks, read.command.epoch, part.local_extents)
                if found != part.tags:
                    bad.update(block for block, tag, want in zip(part.local_blocks, found, part.tags) if tag != want)
        return tuple(index for index, block in enumerate(read.command.local_block_ids) if block in bad) if bad else ()

    def _fail(self, command: ReadBlocks, issued_s: float, error: str) -> None:
        seconds, transport = time.monotonic() - issued_s, self._transport_to(command.peer)
        self._report(ReadFinished(read_id=command.read_id, error=error, seconds=seconds, transport=transport))

    def _transport_to(self, name: str) -> str:
        peer = self._peers.get(name)
        # `shm@1f3a`: of which host's memory it is says nothing here.
        return "none" if peer is None or peer.transport is None else peer.transport.name.partition("@")[0]

    def _report(self, report: KvReport) -> None:
        self._reports.append(RankReport(rank=self._rank, report=report))

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise TransferError(f"the KV agent of rank {self._rank} failed: {self._failure}") from self._failure

    def _close_transports(self) -> None:
        for transport in self._transports.values():
            transport.close()


def _rank_name(peer: str, rank: int) -> str:
    """One rank of a peer, to a transport."""
    return f"{peer} rank {rank}"


def open_agent(
    choice: str, *, regions: Sequence[KvRegion], pages: PageFacts, settings: TransportSettings
) -> tuple[KvAgent, str]:
    """The agent for `kv_transfer.transport`, and in words which transports were chosen and why.

    `auto` takes every transport that can export these regions; a named one must, or `TransferError` says why not.
    """
    if choice != "auto":
        exports = [_open_exported(choice, regions, settings)]
        reasons = [f"{exports[0][0].name} (configured)"]
    else:
        device_type = regions[0].blocks.device.type
        names = registry.available(device_type)
        outcomes = {name: _try_open_exported(name, regions, replace(settings, is_named=False)) for name in names}
        exports = [outcome for outcome in outcomes.values() if not isinstance(outcome, TransferError)]
        reasons = [", ".join(transport.name for transport, _ in exports) + " (automatic, best first)"]
        reasons += [f"no {name}: {outcome}" for name, outcome in outcomes.items() if isinstance(outcome, TransferError)]
        reasons += [f"no {name}: {reason}" for name, reason in registry.missing(device_type).items()]
        if not exports:
            raise TransferError("no KV transport can export this memory; " + "; ".join(reasons[1:]))
    try:
        return KvAgent(rank=settings.rank, regions=regions, pages=pages, exports=exports), "; ".join(reasons)
    except TransferError:
        for transport, _ in exports:
            transport.close()
        raise


def _open_exported(name: str, regions: Sequence[KvRegion], settings: TransportSettings) -> tuple[KvTransport, bytes]:
    """A transport and its descriptor of the regions; closed again if it cannot export them."""
    transport = registry.open_transport(name, settings)
    try:
        return transport, transport.export(tuple(regions))
    except TransferError:
        transport.close()
        raise


def _try_open_exported(
    name: str, regions: Sequence[KvRegion], settings: TransportSettings
) -> tuple[KvTransport, bytes] | TransferError:
    """The same, or why not."""
    try:
        return _open_exported(name, regions, settings)
    except TransferError as exc:
        return exc
