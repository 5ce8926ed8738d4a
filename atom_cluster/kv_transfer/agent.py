"""KvAgent: executes an engine's KV commands on one rank, in a thread of its own, so that computing never waits for it.

It connects and reads through the transports, tags blocks for peers, and checks the tags of every block it read before
the engine hears that the read is over. Each `ReadBlocks` ends in exactly one report within its timeout and a short
grace; a transport that breaks this promise ends the agent, since nobody could tell when it stops writing to blocks.

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
from dataclasses import dataclass

import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer import registry
from atom_cluster.kv_transfer.checksum import BlockTagger
from atom_cluster.kv_transfer.combine import ReportCombiner, merge_offers
from atom_cluster.kv_transfer.protocol import KvRegion, KvTransport, ReadCompletion
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.messages.transfer import (
    BlocksTagged,
    ConnectPeer,
    DropPeer,
    KvCommand,
    KvReport,
    RankReport,
    ReadBlocks,
    ReadFinished,
    TagBlocks,
)
from atom_cluster.units import Deadline

__all__ = ["KvAgent", "ReportCombiner", "merge_offers", "open_agent"]

_log = logging.getLogger(__name__)

_BUSY_POLL_S = 0.0005
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


@dataclass(frozen=True, slots=True)
class _Read:
    """A read that was handed to a transport."""

    command: ReadBlocks
    issued_s: float
    deadline: Deadline


@dataclass(frozen=True, slots=True)
class _Peer:
    """A peer that can be read from, or why it cannot."""

    transport: KvTransport | None
    error: str = ""


class KvAgent:
    """One rank's KV transfers. Owns the transports and a thread; `execute` and `poll` never block.

    `execute` is to be called from the thread that issues the forward passes, after they were issued: on a device,
    commands wait for the work issued before them, and neither side waits for the other otherwise.
    """

    def __init__(self, *, rank: int, regions: Sequence[KvRegion], exports: Sequence[tuple[KvTransport, bytes]]) -> None:
        """`exports`: transports, best first, each with what its `export` of these regions returned.

        Owns the transports from here on, unless it raises `TransferError` because these regions cannot be tagged.
        """
        self._rank = rank
        self._device = regions[0].blocks.device
        self._tagger = BlockTagger(regions)
        self._transports = {transport.name: transport for transport, _ in exports}
        self.descriptors: Mapping[str, bytes] = {transport.name: descriptor for transport, descriptor in exports}
        """How peers reach this rank's memory, by transport name, best first. For `merge_offers`."""
        self._peers: dict[str, _Peer] = {}
        self._reads: dict[int, _Read] = {}
        self._waiting: deque[_Order] = deque()
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
            if after is None and self._device.type == "cuda" and isinstance(command, (TagBlocks, ReadBlocks)):
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
        timeout_s = _BUSY_POLL_S if self._reads or self._waiting else _IDLE_POLL_S
        try:
            order = self._inbox.get(timeout=timeout_s)
            while order is not None:
                self._waiting.append(order)
                order = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _execute_ready(self) -> None:
        while self._waiting and self._waiting[0].is_ready:
            order = self._waiting.popleft()
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
        tags = self._tagger.tags(command.group, command.block_ids, command.epoch)
        self._report(
            BlocksTagged(
                ticket_id=command.ticket_id, first_block=command.first_block, tags=(tags,), group=command.group
            )
        )

    def _connect(self, command: ConnectPeer) -> None:
        """A failure is not an error here: it is told by the reads from this peer."""
        known = self._peers.get(command.peer)
        if known is not None and known.transport is not None:
            return
        transport = self._transports.get(command.transport)
        try:
            if transport is None:
                raise TransferError(f"no transport {command.transport!r} here; there are {', '.join(self._transports)}")
            if len(command.descriptors) <= self._rank:
                raise TransferError(f"the peer has {len(command.descriptors)} ranks, none for rank {self._rank}")
            transport.connect(command.peer, command.descriptors[self._rank])
            self._peers[command.peer] = _Peer(transport)
        except TransferError as exc:
            _log.warning("rank %d cannot read from %s: %s", self._rank, command.peer, exc)
            self._peers[command.peer] = _Peer(None, f"cannot connect: {exc}")

    def _drop(self, command: DropPeer) -> None:
        peer = self._peers.pop(command.peer, None)
        if peer is not None and peer.transport is not None:
            peer.transport.disconnect(command.peer)

    def _start_read(self, command: ReadBlocks, issued_s: float) -> None:
        peer = self._peers.get(command.peer, _Peer(None, "unknown peer"))
        error = self._defect(command) or peer.error
        if error or peer.transport is None:
            self._fail(command, issued_s, error)
            return
        deadline = Deadline(issued_s + command.timeout_s)
        self._reads[command.read_id] = _Read(command, issued_s, deadline)
        peer.transport.start_read(
            command.read_id, command.peer, command.group, command.remote_block_ids, command.local_block_ids, deadline
        )

    def _defect(self, command: ReadBlocks) -> str:
        """What makes the command itself impossible to carry out; empty when nothing does."""
        num_blocks = len(command.local_block_ids)
        if len(command.remote_block_ids) != num_blocks or len(set(command.local_block_ids)) != num_blocks:
            return "local blocks must be distinct and as many as remote ones"
        if command.tags and (len(command.tags) <= self._rank or len(command.tags[self._rank]) != num_blocks):
            return f"there is not one tag per block for rank {self._rank}"
        if command.read_id in self._reads:
            raise TransferError(f"read {command.read_id} was started twice")
        return ""

    def _collect(self) -> None:
        for transport in self._transports.values():
            for completion in transport.poll():
                self._finish(completion)
        for read in self._reads.values():
            if time.monotonic() > read.deadline.at_s + _GRACE_S:
                raise TransferError(f"read {read.command.read_id} did not end within {_GRACE_S} s of its deadline")

    def _finish(self, completion: ReadCompletion) -> None:
        read = self._reads.pop(completion.read_id, None)
        if read is None:
            raise TransferError(f"a transport ended read {completion.read_id}, which is not under way")
        if completion.error is not None:
            self._fail(read.command, read.issued_s, completion.error)
            return
        self._report(
            ReadFinished(
                read_id=completion.read_id,
                bad_blocks=self._bad_blocks(read.command),
                num_bytes=completion.num_bytes,
                seconds=time.monotonic() - read.issued_s,
            )
        )

    def _bad_blocks(self, command: ReadBlocks) -> tuple[int, ...]:
        if not command.tags:
            return ()
        found = self._tagger.tags(command.group, command.local_block_ids, command.epoch)
        return tuple(i for i, (tag, want) in enumerate(zip(found, command.tags[self._rank])) if tag != want)

    def _fail(self, command: ReadBlocks, issued_s: float, error: str) -> None:
        self._report(ReadFinished(read_id=command.read_id, error=error, seconds=time.monotonic() - issued_s))

    def _report(self, report: KvReport) -> None:
        self._reports.append(RankReport(rank=self._rank, report=report))

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise TransferError(f"the KV agent of rank {self._rank} failed: {self._failure}") from self._failure

    def _close_transports(self) -> None:
        for transport in self._transports.values():
            transport.close()


def open_agent(choice: str, *, regions: Sequence[KvRegion], settings: TransportSettings) -> tuple[KvAgent, str]:
    """The agent for `kv_transfer.transport`, and in words which transports were chosen and why.

    `auto` takes every transport that can export these regions; a named one must, or `TransferError` says why not.
    """
    if choice != "auto":
        exports = [_open_exported(choice, regions, settings)]
        reasons = [f"{exports[0][0].name} (configured)"]
    else:
        names = registry.available(regions[0].blocks.device.type)
        outcomes = {name: _try_open_exported(name, regions, settings) for name in names}
        exports = [outcome for outcome in outcomes.values() if not isinstance(outcome, TransferError)]
        reasons = [", ".join(transport.name for transport, _ in exports) + " (automatic, best first)"]
        reasons += [f"no {name}: {outcome}" for name, outcome in outcomes.items() if isinstance(outcome, TransferError)]
        if not exports:
            raise TransferError("no KV transport can export this memory; " + "; ".join(reasons[1:]))
    try:
        return KvAgent(rank=settings.rank, regions=regions, exports=exports), "; ".join(reasons)
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
