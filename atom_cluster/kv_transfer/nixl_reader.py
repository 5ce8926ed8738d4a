"""The reading side of the nixl transport: a thread that reads blocks through one agent, and its promise.

NIXL cannot take a read back (`nixl_agent.py`), and the protocol wants nothing written after a completion. So:

- A read is cut into transfers, a few of them under way per peer. One that is to stop (deadline, disconnect) posts no
  more of them and waits a moment for those under way. That is how it ends when the peer is only slow.
- If they do not end in that moment, or any of them fails, the agent is destroyed. The reads that are to stop complete
  only then, when nothing can write any more. The others begin anew, with what they lacked, on the next agent.

So a peer that died or stands still costs the reads from other peers a few milliseconds and the registration of the
memory, not their lives. An agent that cannot be destroyed fails the thread, and with it the rank. Knows nothing of
tags, tickets or descriptors.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Protocol

import numpy as np
import numpy.typing as npt

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.nixl_agent import Memory, Pieces, Transfer
from atom_cluster.kv_transfer.pieces import Extent, Piece
from atom_cluster.kv_transfer.protocol import ReadCompletion
from atom_cluster.units import Deadline, MiB

_log = logging.getLogger(__name__)

_TRANSFER_BYTES = 8 * MiB
_TRANSFER_RUNS = 4096
"""At most so many bytes, or runs of bytes, are in a transfer, but never less than a block."""
_MAX_TRANSFERS_PER_PEER = 8
_LINGER_S = 1.0
"""How long a read that is to stop may wait for its transfers."""
_RETRY_S = 1.0
"""Reads from a peer that failed end with the same error for so long, rather than cost the others another agent."""
_WORKED_S = 50e-6
"""Looking after transfers takes longer than this only if there was something to do; then there may be more."""
_BUSY_PAUSE_S = 0.0001
_IDLE_PAUSE_S = 0.05


class ReadAgent(Protocol):
    """What is used of `NixlAgent`, which describes it."""

    def connect(self, metadata: bytes) -> str: ...  # noqa: D102

    def disconnect(self, name: str) -> None: ...  # noqa: D102

    def post(self, name: str, memory: Memory, pieces: Pieces) -> Transfer: ...  # noqa: D102

    def is_over(self, transfer: Transfer) -> bool: ...  # noqa: D102

    def progress(self) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Where the blocks of a cache group lie in some process."""

    address: int
    """Of block 0."""
    stride_bytes: int
    """From one block to the next."""
    block_bytes: int


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """A peer's blocks, and how to reach them."""

    metadata: bytes
    """Of its agent; authentic."""
    memory: Memory
    layouts: tuple[BlockLayout, ...]
    """By cache group."""


@dataclass(slots=True, eq=False)
class ReadOrder:
    """A read, with how far it is."""

    read_id: int
    peer: str
    group: int
    remote_blocks: tuple[int, ...]
    local_blocks: tuple[int, ...]
    deadline: Deadline
    pieces: tuple[Piece, ...] | None = None
    """What is read of each block; None: all of it."""
    started_s: float = field(default_factory=time.monotonic)
    todo: deque[slice] = field(default_factory=deque)
    """Positions of blocks that are yet to be posted."""
    under_way: dict[Transfer, slice] = field(default_factory=dict)
    stop_reason: str | None = None
    """Set: nothing more is posted, and the read ends with this error as soon as nothing is under way."""
    stop_by_s: float = 0.0

    def stop(self, reason: str) -> None:
        """Begin to end the read."""
        if self.stop_reason is None:
            self.stop_reason, self.stop_by_s = reason, time.monotonic() + _LINGER_S
            self.todo.clear()


@dataclass(slots=True, eq=False)
class _Peer:
    source: PeerMemory
    reads: dict[int, ReadOrder] = field(default_factory=dict)
    agent_name: str | None = None
    """By which the present agent knows it; None: it does not."""
    failure: str = ""
    retry_at_s: float = 0.0
    """Until then, reads end with `failure`."""

    @property
    def num_under_way(self) -> int:
        return sum(len(read.under_way) for read in self.reads.values())


class BlockReader:
    """Reads from any number of peers. Owns the thread and the agent; methods are called from one other thread."""

    def __init__(self, *, make_agent: Callable[[], ReadAgent], layouts: Sequence[BlockLayout]) -> None:
        """`make_agent` is called in the thread. `layouts`: of this rank's blocks, by cache group."""
        self._make_agent = make_agent
        self._layouts = layouts
        self._agent: ReadAgent | None = None
        self._peers: dict[str, _Peer] = {}
        self._leaving: list[_Peer] = []
        """Disconnected, with reads that have not ended yet."""
        self._completions: deque[ReadCompletion] = deque()
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._is_closing = False
        self._failure: str | None = None
        self._thread = Thread(target=self._main, name="kv-nixl-read", daemon=True)
        self._thread.start()

    def connect(self, peer: str, source: PeerMemory) -> None:
        """Get to know a peer."""
        self._commands.put(lambda: self._peers.update({peer: _Peer(source)}))

    def start(self, read: ReadOrder) -> None:
        """Start a read from a known peer; block ids have been checked."""
        self._commands.put(lambda: self._start(read))

    def disconnect(self, peer: str) -> None:
        """Forget a peer; its reads end with an error."""
        self._commands.put(lambda: self._disconnect(peer))

    def poll(self) -> list[ReadCompletion]:
        """Reads that ended since the last call. Raises `TransferError` if the thread has failed."""
        if self._failure is not None:
            raise TransferError(f"reading through NIXL failed: {self._failure}")
        completions = []
        while self._completions:
            completions.append(self._completions.popleft())
        return completions

    def close(self) -> None:
        """Stop and destroy the agent; nothing is written afterwards. Idempotent.

        Raises `TransferError` if it could not be destroyed.
        """
        self._is_closing = True
        self._commands.put(lambda: None)
        self._thread.join()
        if self._agent is not None:
            raise TransferError(f"reading through NIXL could not be ended: {self._failure}")

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _main(self) -> None:
        """Supervisor of the thread: whatever goes wrong is logged here and raised again to the owner by `poll`."""
        try:
            pause_s = _IDLE_PAUSE_S
            while not self._is_closing:
                self._take_commands(pause_s)
                pause_s = self._work()
        except Exception as exc:  # noqa: BLE001 a supervisor
            # As text: a record with the traceback would keep the agent in use.
            _log.error("reading KV through NIXL failed\n%s", traceback.format_exc())
            self._failure = str(exc)
        finally:
            try:
                self._destroy_agent()
            except TransferError as exc:
                self._failure = str(exc)

    def _take_commands(self, pause_s: float) -> None:
        with contextlib.suppress(Empty):
            self._commands.get(timeout=pause_s)()
            while True:
                self._commands.get_nowait()()

    def _start(self, read: ReadOrder) -> None:
        peer = self._peers[read.peer]
        peer.reads[read.read_id] = read
        if time.monotonic() < peer.retry_at_s:
            read.stop(peer.failure)
            return
        runs = self._runs(read)
        blocks_per_transfer = max(
            1, min(_TRANSFER_BYTES // int(runs.num_bytes.sum()), _TRANSFER_RUNS // len(runs.local))
        )
        num_blocks = len(read.local_blocks)
        for first in range(0, num_blocks, blocks_per_transfer):
            read.todo.append(slice(first, min(first + blocks_per_transfer, num_blocks)))

    def _disconnect(self, name: str) -> None:
        peer = self._peers.pop(name, None)
        if peer is not None:
            self._leaving.append(peer)
            for read in peer.reads.values():
                read.stop("disconnected")

    def _work(self) -> float:
        """Bring every read a step forward; for how many seconds there is nothing to do unless a command comes."""
        begun_s = time.monotonic()
        for peer in (*self._peers.values(), *self._leaving):
            failure = self._collect(peer) or self._post(peer)
            # No handler of an exception is left here: a traceback would keep the agent in use.
            if failure is not None:
                self._fail(peer, failure)
        self._expire()
        self._end_reads()
        if not any(peer.reads for peer in self._peers.values()) and not self._leaving:
            if self._agent is not None:
                self._agent.progress()
            return _IDLE_PAUSE_S
        return 0.0 if time.monotonic() - begun_s > _WORKED_S else _BUSY_PAUSE_S

    def _collect(self, peer: _Peer) -> str | None:
        """Note what is over; the error, if something failed."""
        for read in peer.reads.values():
            for transfer in tuple(read.under_way):
                assert self._agent is not None, "it has transfers"
                try:
                    if self._agent.is_over(transfer):
                        del read.under_way[transfer]
                except TransferError as exc:
                    return str(exc)
        return None

    def _post(self, peer: _Peer) -> str | None:
        """Post transfers, oldest read first, as long as few enough are under way; the error, if something failed."""
        try:
            for read in peer.reads.values():
                while read.todo and not read.deadline.has_passed:
                    if peer.num_under_way >= _MAX_TRANSFERS_PER_PEER:
                        return None
                    agent, name = self._connected(peer)
                    part = read.todo.popleft()
                    transfer = agent.post(name, peer.source.memory, self._pieces(peer.source, read, part))
                    read.under_way[transfer] = part
        except TransferError as exc:
            return str(exc)
        return None

    def _connected(self, peer: _Peer) -> tuple[ReadAgent, str]:
        if self._agent is None:
            self._agent = self._make_agent()
        if peer.agent_name is None:
            peer.agent_name = self._agent.connect(peer.source.metadata)
        return self._agent, peer.agent_name

    def _runs(self, read: ReadOrder) -> Pieces:
        """What is read of a block, as offsets from its start."""
        if read.pieces is None:
            zero = np.zeros(1, dtype=np.uint64)
            return Pieces(zero, zero, np.full(1, self._layouts[read.group].block_bytes, dtype=np.uint64))
        return Pieces(
            np.concatenate([_offsets(piece.local) for piece in read.pieces]),
            np.concatenate([_offsets(piece.remote) for piece in read.pieces]),
            np.concatenate([np.full(p.local.count, p.local.num_bytes, dtype=np.uint64) for p in read.pieces]),
        )

    def _pieces(self, source: PeerMemory, read: ReadOrder, part: slice) -> Pieces:
        runs = self._runs(read)
        local_starts = _starts(self._layouts[read.group], read.local_blocks[part])
        local = (local_starts[:, None] + runs.local).reshape(-1)
        remote = (_starts(source.layouts[read.group], read.remote_blocks[part])[:, None] + runs.remote).reshape(-1)
        num_bytes = np.tile(runs.num_bytes, len(local_starts))
        # What lies side by side in both places is one piece.
        is_first = np.ones(len(local), dtype=bool)
        is_first[1:] = (local[1:] != local[:-1] + num_bytes[:-1]) | (remote[1:] != remote[:-1] + num_bytes[:-1])
        firsts = np.flatnonzero(is_first)
        return Pieces(local[firsts], remote[firsts], np.add.reduceat(num_bytes, firsts))

    def _expire(self) -> None:
        """Stop what is past its deadline, and give the agent up for what then does not stop."""
        now_s = time.monotonic()
        for read in self._all_reads():
            if read.deadline.has_passed:
                read.stop("the deadline passed")
        if any(read.under_way and read.stop_reason and now_s >= read.stop_by_s for read in self._all_reads()):
            self._replace_agent("a read does not end")

    def _fail(self, peer: _Peer, failure: str) -> None:
        """A transfer of this peer failed, or it cannot be connected to."""
        peer.failure, peer.retry_at_s = failure, time.monotonic() + _RETRY_S
        for read in peer.reads.values():
            read.stop(failure)
        self._replace_agent(failure)

    def _replace_agent(self, reason: str) -> None:
        _log.warning("the NIXL agent that reads is given up: %s", reason)
        self._destroy_agent()
        for peer in (*self._peers.values(), *self._leaving):
            peer.agent_name = None
            for read in peer.reads.values():
                if read.stop_reason is None:
                    read.todo.extendleft(reversed(read.under_way.values()))
                read.under_way.clear()

    def _destroy_agent(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _end_reads(self) -> None:
        for peer in (*self._peers.values(), *self._leaving):
            for read in tuple(peer.reads.values()):
                if not read.under_way and not read.todo:
                    del peer.reads[read.read_id]
                    self._complete(read)
        for peer in tuple(self._leaving):
            if not peer.reads:
                self._leaving.remove(peer)
                self._forget(peer)

    def _complete(self, read: ReadOrder) -> None:
        num_bytes = 0 if read.stop_reason else len(read.local_blocks) * int(self._runs(read).num_bytes.sum())
        seconds = time.monotonic() - read.started_s
        self._completions.append(ReadCompletion(read.read_id, read.stop_reason, num_bytes, seconds))

    def _forget(self, peer: _Peer) -> None:
        name = peer.agent_name
        # It may have been connected to again meanwhile, or under two names.
        others = {other.agent_name for other in (*self._peers.values(), *self._leaving)}
        if self._agent is None or name is None or name in others:
            return
        try:
            self._agent.disconnect(name)
        except TransferError as exc:
            _log.warning("a peer without reads could not be forgotten: %s", exc)

    def _all_reads(self) -> Iterator[ReadOrder]:
        for peer in (*self._peers.values(), *self._leaving):
            yield from peer.reads.values()


def _starts(layout: BlockLayout, blocks: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Addresses of these blocks."""
    return np.uint64(layout.address) + np.asarray(blocks, dtype=np.uint64) * np.uint64(layout.stride_bytes)


def _offsets(extent: Extent) -> npt.NDArray[np.uint64]:
    """Of the extent's runs, from the start of the block."""
    return np.uint64(extent.offset) + np.arange(extent.count, dtype=np.uint64) * np.uint64(extent.stride)
