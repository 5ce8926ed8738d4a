"""The reading side of the tcp transport: asks peers for blocks and writes them where they belong.

One thread does all writing and all completing, so nothing is written to a block after its read completed. A read is cut
into chunks; a few of them are under way per peer, so the wire is never idle and giving a read up costs little. Bytes of
a read that was given up are received into a scratch buffer. Knows nothing of tags or tickets.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from atom_cluster.errors import ProtocolError
from atom_cluster.kv_transfer import tcp_wire as wire
from atom_cluster.kv_transfer.block_memory import VIEW_BYTES, Landing, block_memory
from atom_cluster.kv_transfer.pieces import Extent
from atom_cluster.kv_transfer.protocol import KvRegion, ReadCompletion
from atom_cluster.kv_transfer.tcp_channel import Channel, ChannelLoop, Session
from atom_cluster.units import Deadline, MiB

_CHUNK_BYTES = 8 * MiB
_MAX_CHUNKS_UNDER_WAY = 4
_STUCK_S = 1.0
"""A connection that moved no byte for this long when a read's deadline passes is given up, not just the read."""


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a peer's rank serves its blocks."""

    host: str
    port: int
    export_id: bytes


@dataclass(slots=True)
class ReadOrder:
    """A read, with how far it is."""

    read_id: int
    peer: str
    group: int
    remote_blocks: tuple[int, ...]
    local_blocks: tuple[int, ...]
    deadline: Deadline
    block_bytes: int
    """To be read of each block."""
    remote_extents: tuple[Extent, ...] | None = None
    """Which bytes of a block these are; None: all."""
    local_extents: tuple[Extent, ...] | None = None
    started_s: float = field(default_factory=time.monotonic)
    num_asked: int = 0
    """Blocks that were asked for."""
    num_received: int = 0
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Blocks [first, first + num_blocks) of a read, asked for and not yet received."""

    read: ReadOrder
    sequence: int
    num_blocks: int
    landing: Landing


@dataclass(slots=True)
class _Link:
    """A peer, and the connection to it while there is one."""

    address: ServerAddress
    reads: dict[int, ReadOrder] = field(default_factory=dict)
    channel: Channel | None = None
    session_key: bytes = b""
    """Empty until the handshake is through."""
    next_sequence: int = 0
    under_way: deque[_Chunk] = field(default_factory=deque)
    is_landing: bool = False
    """Whether the channel is filling blocks of `under_way[0]` right now."""


class BlockReader:
    """Reads from any number of peers. Owns the thread and the connections; methods are called from one other thread."""

    def __init__(self, *, key: wire.WireKey, regions: Sequence[KvRegion]) -> None:
        self._key = key
        self._memory = block_memory(regions)
        self._scratch = memoryview(bytearray(VIEW_BYTES))
        self._links: dict[str, _Link] = {}
        self._completions: deque[ReadCompletion] = deque()
        self._loop = ChannelLoop("kv-tcp-read", on_tick=self._expire)
        self._loop.start()

    def connect(self, peer: str, address: ServerAddress) -> None:
        """Get to know a peer, and begin to connect so that the first read finds the connection open."""
        self._loop.call(lambda: self._add_link(peer, address))

    def start(self, read: ReadOrder) -> None:
        """Start a read from a known peer; block ids have been checked."""
        self._loop.call(lambda: self._start(read))

    def disconnect(self, peer: str) -> None:
        """Forget a peer; its reads end with an error."""
        self._loop.call(lambda: self._drop_link(peer))

    def poll(self) -> list[ReadCompletion]:
        """Reads that ended since the last call. Raises `TransferError` if the thread has failed."""
        self._loop.check_alive()
        completions = []
        while self._completions:
            completions.append(self._completions.popleft())
        return completions

    def close(self) -> None:
        """Stop; nothing is written afterwards. Idempotent."""
        self._loop.close()

    # --- in the loop's thread ---------------------------------------------------------------------------------------

    def _add_link(self, peer: str, address: ServerAddress) -> None:
        link = self._links[peer] = _Link(address)
        self._open(link)

    def _drop_link(self, peer: str) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            if link.channel is not None:
                self._loop.discard(link.channel)
            self._reset(link, "disconnected")

    def _start(self, read: ReadOrder) -> None:
        link = self._links[read.peer]
        link.reads[read.read_id] = read
        if not read.local_blocks:
            self._end(link, read, None)
        elif link.channel is None:
            self._open(link)
        elif link.session_key:
            self._ask(link)

    def _open(self, link: _Link) -> None:
        """Connect anew. A failure ends the reads that are waiting; the next read tries again."""
        family = socket.AF_INET6 if ":" in link.address.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(0.0)
        try:
            sock.connect((link.address.host, link.address.port))
        except BlockingIOError:
            pass  # under way, as usual
        except OSError as exc:
            sock.close()
            self._reset(link, f"cannot connect: {exc}")
            return
        channel = link.channel = Channel(sock, is_connecting=True)
        self._loop.add(channel, self._session(link, channel), lambda reason: self._lose(link, reason))

    def _session(self, link: _Link, channel: Channel) -> Session:
        export_id = link.address.export_id
        hello, answer = bytearray(wire.HELLO_BYTES), bytearray(wire.PROOF_BYTES)
        yield memoryview(hello)
        wire.check_hello(hello)
        proof = self._key.client_proof(export_id, bytes(hello), wire.make_nonce())
        channel.send(proof)
        yield memoryview(answer)
        self._key.check_server_proof(export_id, bytes(hello), proof, bytes(answer))
        link.session_key = self._key.session_key(export_id, bytes(hello), proof)
        self._ask(link)
        while True:
            yield from self._receive(link)
            self._ask(link)

    def _receive(self, link: _Link) -> Session:
        header = bytearray(wire.RESPONSE_HEADER_BYTES)
        yield memoryview(header)
        if not link.under_way:
            raise ProtocolError("a response that was not asked for")
        chunk = link.under_way[0]
        expected_bytes = chunk.num_blocks * chunk.read.block_bytes
        status = wire.decode_response(link.session_key, bytes(header), chunk.sequence, expected_bytes)
        if status == wire.STATUS_OK:
            link.is_landing = True
            for view in chunk.landing.views():
                yield self._scratch[: len(view)] if chunk.read.is_over else view
            link.is_landing = False
        link.under_way.popleft()
        read = chunk.read
        if read.is_over:
            return
        if status != wire.STATUS_OK:
            self._end(link, read, f"the peer refused the read (status {status})")
            return
        chunk.landing.commit()
        read.num_received += chunk.num_blocks
        if read.num_received == len(read.local_blocks):
            self._end(link, read, None)

    def _ask(self, link: _Link) -> None:
        """Send requests, oldest read first, as long as few enough are under way."""
        assert link.channel is not None, "a session has a channel"
        for read in link.reads.values():
            while read.num_asked < len(read.local_blocks):
                if len(link.under_way) >= _MAX_CHUNKS_UNDER_WAY:
                    return
                part = slice(read.num_asked, read.num_asked + _chunk_blocks(read))
                remote, local = read.remote_blocks[part], read.local_blocks[part]
                landing = self._memory.landing(read.group, local, read.local_extents)
                chunk = _Chunk(read, link.next_sequence, len(local), landing)
                request = wire.encode_request(link.session_key, chunk.sequence, read.group, remote, read.remote_extents)
                self._loop.send(link.channel, request)
                link.next_sequence += 1
                link.under_way.append(chunk)
                read.num_asked += len(local)

    def _expire(self) -> float | None:
        """End reads whose deadline passed; seconds until the next one does."""
        next_s: float | None = None
        for link in self._links.values():
            for read in tuple(link.reads.values()):
                if not read.deadline.has_passed:
                    next_s = min(read.deadline.remaining_s, next_s if next_s is not None else read.deadline.remaining_s)
                    continue
                self._end(link, read, "the deadline passed")
                channel = link.channel
                if channel is not None and time.monotonic() - channel.last_progress_s > _STUCK_S:
                    # The next read begins afresh.
                    self._loop.discard(channel)
                    self._lose(link, "the peer stalled")
                    break
        return next_s

    def _end(self, link: _Link, read: ReadOrder, error: str | None) -> None:
        del link.reads[read.read_id]
        read.is_over = True
        if link.is_landing and link.channel is not None and link.under_way[0].read is read:
            link.channel.divert(self._scratch)
        num_bytes = 0 if error else len(read.local_blocks) * read.block_bytes
        seconds = time.monotonic() - read.started_s
        self._completions.append(ReadCompletion(read.read_id, error, num_bytes, seconds))

    def _lose(self, link: _Link, reason: str) -> None:
        """The connection is over."""
        self._reset(link, reason if link.session_key else f"no connection to the peer: {reason}")

    def _reset(self, link: _Link, reason: str) -> None:
        link.channel = None
        link.session_key = b""
        link.next_sequence = 0
        link.under_way.clear()
        link.is_landing = False
        for read in tuple(link.reads.values()):
            self._end(link, read, reason)


def _chunk_blocks(read: ReadOrder) -> int:
    return min(wire.MAX_REQUEST_BLOCKS, max(1, _CHUNK_BYTES // read.block_bytes))
