"""KV transfers between simulated devices: transport "sim". Reads take bytes / bandwidth, one after another.

Within a process, a read copies what the peer's blocks contain when it ends, and checks the tags. Memory of another
process cannot be looked at: there the tags received are recorded as what the content must hash to, so such a read finds
no bad block by itself, but a request whose tokens do not lead to these tags computes with noise. Nor can the end of a
process be seen from here; the engine drops the peer when it loses its connection.

Knows nothing of rows and steps.
"""

from __future__ import annotations

import secrets
import weakref
from dataclasses import dataclass

from atom_cluster.engine.sim_memory import BlockContent, Claim, SimulatedMemory, tag_of
from atom_cluster.messages.transfer import (
    BlocksTagged,
    ConnectPeer,
    KvCommand,
    KvReport,
    ReadBlocks,
    ReadFinished,
    TagBlocks,
)
from atom_cluster.units import KiB

TRANSPORT = "sim"

_BYTES_PER_TOKEN = 128 * KiB
"""KV of a model of 32 layers with 8 KV heads of 128 numbers in 16 bits."""

# What an address space is to real transports. Memories leave it when closed or collected.
_PROCESS = secrets.token_hex(8)
_MEMORY_BY_NAME: weakref.WeakValueDictionary[str, SimulatedMemory] = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class _Peer:
    name: str | None = None
    """In this process; None when the peer is in another one."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Read:
    command: ReadBlocks
    peer: _Peer
    issued_s: float
    ends_s: float
    error: str = ""
    """Known from the start."""


class SimulatedTransfers:
    """Executes an engine's KV commands on one simulated device. `close` frees everything."""

    def __init__(self, *, memory: SimulatedMemory, bytes_per_s: float) -> None:
        self._memory = memory
        self._bytes_per_s = bytes_per_s
        self._name = secrets.token_hex(8)
        self._peers: dict[str, _Peer] = {}
        self._reads: list[_Read] = []
        self._reports: list[KvReport] = []
        self._link_is_free_s = 0.0
        _MEMORY_BY_NAME[self._name] = memory

    @property
    def descriptor(self) -> bytes:
        """What a peer's `ConnectPeer` carries."""
        return f"{_PROCESS}/{self._name}".encode()

    def execute(self, command: KvCommand, now_s: float) -> None:
        """Carry out or start a command; it is this late on the runner's clock."""
        if isinstance(command, TagBlocks):
            tags = tuple(self._memory.tag(page, command.epoch, command.group) for page in command.block_ids)
            self._reports.append(
                BlocksTagged(
                    ticket_id=command.ticket_id, first_block=command.first_block, tags=(tags,), group=command.group
                )
            )
        elif isinstance(command, ConnectPeer):
            if self._peers.get(command.peer, _Peer(error="unknown peer")).error:
                self._peers[command.peer] = _parse_peer(command)
        elif isinstance(command, ReadBlocks):
            self._reads.append(self._start(command, now_s))
        else:
            self._drop(command.peer, now_s)

    def poll(self, now_s: float) -> list[KvReport]:
        """Reports since the last call, of commands that ended by now."""
        for read in [read for read in self._reads if read.ends_s <= now_s]:
            self._reads.remove(read)
            self._reports.append(self._finish(read))
        reports, self._reports = self._reports, []
        return reports

    def close(self) -> None:
        """Abandon reads under way; peers cannot read from here any more. Idempotent."""
        _MEMORY_BY_NAME.pop(self._name, None)
        self._reads.clear()
        self._peers.clear()

    def _drop(self, peer: str, now_s: float) -> None:
        self._peers.pop(peer, None)
        for read in [read for read in self._reads if read.command.peer == peer and read.ends_s > now_s]:
            self._reads.remove(read)
            self._reports.append(_failed(read.command, "the peer was dropped", now_s - read.issued_s))

    def _start(self, command: ReadBlocks, now_s: float) -> _Read:
        peer = self._peers.get(command.peer, _Peer(error="unknown peer"))
        error = peer.error or _defect(command, peer) or self._missing(command)
        if error:
            return _Read(command, peer, now_s, now_s, error)
        begins_s = max(now_s, self._link_is_free_s)
        ends_s = begins_s + self._num_bytes(command) / self._bytes_per_s
        deadline_s = now_s + command.timeout_s
        if ends_s > deadline_s:
            # A read given up while others are ahead of it has never been on the link.
            self._link_is_free_s = max(self._link_is_free_s, min(ends_s, deadline_s))
            return _Read(command, peer, now_s, deadline_s, "timed out")
        self._link_is_free_s = ends_s
        return _Read(command, peer, now_s, ends_s)

    def _missing(self, command: ReadBlocks) -> str:
        missing = [page for page in command.local_block_ids if not self._memory.has_page(command.group, page)]
        return f"there are no blocks {missing} here" if missing else ""

    def _num_bytes(self, command: ReadBlocks) -> int:
        return len(command.local_block_ids) * self._memory.block_size * _BYTES_PER_TOKEN

    def _finish(self, read: _Read) -> ReadFinished:
        command, seconds = read.command, read.ends_s - read.issued_s
        if read.error:
            return _failed(command, read.error, seconds)
        tags = command.tags[0] if command.tags else (None,) * len(command.local_block_ids)
        contents = _fetch(command, read.peer, tags)
        if contents is None:
            return _failed(command, "the peer, or a block that it named, is gone", seconds)
        for block_id, content in zip(command.local_block_ids, contents):
            self._memory.fill(block_id, content, command.group)
        return ReadFinished(
            read_id=command.read_id,
            bad_blocks=tuple(
                i for i, (content, tag) in enumerate(zip(contents, tags)) if not _has_tag(content, tag, command.epoch)
            ),
            num_bytes=self._num_bytes(command),
            seconds=seconds,
            transport=TRANSPORT,
        )


def _parse_peer(command: ConnectPeer) -> _Peer:
    if command.transport != TRANSPORT:
        return _Peer(error=f"cannot connect: no transport {command.transport!r} here; there is {TRANSPORT}")
    if len(command.descriptors) != 1:
        return _Peer(error=f"cannot connect: the peer has {len(command.descriptors)} ranks, there is one here")
    process, _, name = command.descriptors[0].decode(errors="replace").partition("/")
    return _Peer(name=name if process == _PROCESS else None)


def _defect(command: ReadBlocks, peer: _Peer) -> str:
    """What makes the command itself impossible to carry out; empty when nothing does."""
    num_blocks = len(command.local_block_ids)
    if len(command.remote_block_ids) != num_blocks or len(set(command.local_block_ids)) != num_blocks:
        return "local blocks must be distinct and as many as remote ones"
    if command.group and peer.name is None:
        return "only blocks of the first group can be read from another process"
    if command.tags and (len(command.tags) != 1 or len(command.tags[0]) != num_blocks):
        return "there is not one tag per block for the only rank"
    return ""


def _fetch(command: ReadBlocks, peer: _Peer, tags: tuple[int | None, ...]) -> list[BlockContent] | None:
    """What the peer's blocks contain now; None if it is gone or has no such blocks."""
    if peer.name is None:
        return [BlockContent(claim=Claim(tag, command.epoch)) for tag in tags]
    memory = _MEMORY_BY_NAME.get(peer.name)
    if memory is None or not all(memory.has_page(command.group, page) for page in command.remote_block_ids):
        return None
    return [memory.content(page, command.group) for page in command.remote_block_ids]


def _has_tag(content: BlockContent, tag: int | None, epoch: int) -> bool:
    return tag is None or content.claim is not None or tag_of(content, epoch) == tag


def _failed(command: ReadBlocks, error: str, seconds: float) -> ReadFinished:
    return ReadFinished(read_id=command.read_id, error=error, seconds=seconds, transport=TRANSPORT)
