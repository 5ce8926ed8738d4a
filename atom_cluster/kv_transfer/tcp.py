"""Transport between any two hosts, over TCP, for KV memory on a CPU or a device (then staged through host buffers).

Puts together the server that peers read from (`tcp_server.py`) and the reader (`tcp_client.py`); what is on the wire,
and why these are raw sockets, is in `tcp_wire.py`. Knows nothing of tags or tickets.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.pieces import PeerShape, Piece
from atom_cluster.kv_transfer.protocol import KvRegion, ReadCompletion
from atom_cluster.kv_transfer.regions import RegionShape, check_peer, check_read, packed_bytes, shape_of
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.kv_transfer.tcp_client import BlockReader, ReadOrder, ServerAddress
from atom_cluster.kv_transfer.tcp_server import BlockServer
from atom_cluster.kv_transfer.tcp_wire import MAX_REQUEST_EXTENTS, WireKey
from atom_cluster.link.slow_line import SlowLine, line_of
from atom_cluster.units import Deadline

_MAX_DESCRIPTOR_BYTES = 256 * 1024


class TcpDescriptor(Struct, frozen=True, kw_only=True):
    """What a rank announces; msgpack-encoded it is the descriptor. Holds no secret."""

    rank: int
    host: str
    port: int
    export_id: bytes
    regions: tuple[RegionShape, ...]


class TcpTransport:
    """`KvTransport` over TCP. Owns a server and a reader, with a thread each, from `export` on."""

    def __init__(self, *, rank: int, host: str, secret: bytes, line: SlowLine | None = None) -> None:
        """`host`: this node's address to listen on. `line`: what others connect through, closed with this. Raises
        `TransferError` for a secret under 16 bytes."""
        self.name = "tcp"
        self._rank = rank
        self._host = host
        self._key = WireKey(secret)
        self._line = line
        self._shapes: tuple[RegionShape, ...] = ()
        self._peer_shapes: dict[str, tuple[RegionShape, ...]] = {}
        self._under_way: set[int] = set()
        self._refused: list[ReadCompletion] = []
        self._server: BlockServer | None = None
        self._reader: BlockReader | None = None

    def export(self, regions: tuple[KvRegion, ...]) -> bytes:
        """See `KvTransport`. Starts to listen."""
        self._server = BlockServer(host=self._host, key=self._key, regions=regions)
        self._reader = BlockReader(key=self._key, regions=regions)
        self._shapes = tuple(shape_of(region) for region in regions)
        port = self._server.port
        descriptor = TcpDescriptor(
            rank=self._rank,
            host=self._host,
            port=port if self._line is None else self._line.lead_to(self._host, port),
            export_id=self._server.export_id,
            regions=self._shapes,
        )
        return msgspec.msgpack.encode(descriptor)

    def connect(self, peer: str, descriptor: bytes, shape: PeerShape | None = None) -> None:
        """See `KvTransport`. Whether the peer can be reached and knows the secret is told by reads."""
        if self._reader is None:
            raise TransferError("export this rank's regions before connecting")
        if peer in self._peer_shapes:
            return
        remote = _decode(descriptor)
        check_peer(self._shapes, self._rank, remote.regions, remote.rank, shape)
        self._reader.connect(peer, ServerAddress(remote.host, remote.port, remote.export_id))
        self._peer_shapes[peer] = remote.regions

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
        if read_id in self._under_way:
            raise TransferError(f"read {read_id} is under way already")
        try:
            if self._reader is None or peer not in self._peer_shapes:
                raise TransferError(f"unknown peer {peer}")
            check_read(self._shapes, self._peer_shapes[peer], group, remote_blocks, local_blocks, pieces)
            if pieces is not None and not 0 < len(pieces) <= MAX_REQUEST_EXTENTS:
                raise TransferError(f"{len(pieces)} pieces of a block; there may be 1 to {MAX_REQUEST_EXTENTS}")
        except TransferError as exc:
            self._refused.append(ReadCompletion(read_id, str(exc), 0, 0.0))
            return
        self._under_way.add(read_id)
        order = ReadOrder(read_id, peer, group, remote_blocks, local_blocks, deadline, self._shapes[group].block_bytes)
        if pieces is not None:
            order.remote_extents = tuple(piece.remote for piece in pieces)
            order.local_extents = tuple(piece.local for piece in pieces)
            order.block_bytes = packed_bytes(order.local_extents)
        self._reader.start(order)

    def poll(self) -> list[ReadCompletion]:
        """See `KvTransport`. Raises `TransferError` if a thread of the transport has failed."""
        if self._reader is None or self._server is None:
            return []
        self._server.check_alive()
        completions, self._refused = self._refused + self._reader.poll(), []
        self._under_way.difference_update(completion.read_id for completion in completions)
        return completions

    def disconnect(self, peer: str) -> None:
        """See `KvTransport`."""
        if self._reader is not None and self._peer_shapes.pop(peer, None) is not None:
            self._reader.disconnect(peer)

    def close(self) -> None:
        """See `KvTransport`."""
        for part in (self._reader, self._server, self._line):
            if part is not None:
                part.close()
        self._peer_shapes.clear()


def open_transport(settings: TransportSettings) -> TcpTransport:
    """For the registry."""
    line = None if settings.faults is None else line_of(settings.faults)
    return TcpTransport(rank=settings.rank, host=settings.host, secret=settings.secret, line=line)


def _decode(descriptor: bytes) -> TcpDescriptor:
    if len(descriptor) > _MAX_DESCRIPTOR_BYTES:
        raise TransferError(f"tcp descriptor of {len(descriptor)} bytes is too large")
    try:
        return msgspec.msgpack.decode(descriptor, type=TcpDescriptor)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise TransferError(f"not a tcp descriptor: {exc}") from exc
