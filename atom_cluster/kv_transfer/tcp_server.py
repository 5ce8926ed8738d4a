"""The sending side of the tcp transport: serves blocks of this rank to clients that know the cluster's secret.

One thread for all clients. What strangers can do is bounded: a few connections, a few seconds each, 64 bytes read.
Knows nothing of tickets: a client may read any block, and tells by the tag whether it was the right one.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Sequence

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer import tcp_wire as wire
from atom_cluster.kv_transfer.block_memory import block_memory
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.regions import check_blocks, check_extents, packed_bytes, shape_of
from atom_cluster.kv_transfer.tcp_channel import Channel, ChannelLoop, Session
from atom_cluster.observability.refusals import RefusalLog

_log = logging.getLogger(__name__)

_HANDSHAKE_S = 5.0
_STALLED_S = 60.0
"""A client that takes none of the bytes waiting for it for this long is cut off."""
_MAX_CLIENTS = 512
_MAX_STRANGERS = 64
_SWEEP_S = 0.5
_WILDCARDS = ("", "0.0.0.0", "::", "*")


class BlockServer:
    """Listens on a port of its own. Owns the socket, the thread and the connections; `close` is idempotent."""

    def __init__(self, *, host: str, key: wire.WireKey, regions: Sequence[KvRegion]) -> None:
        """Raises `TransferError` when it cannot listen on `host` or the regions cannot be sent."""
        self.export_id = secrets.token_bytes(16)
        """Names this export; a client that means another one is refused."""
        self._key = key
        self._memory = block_memory(regions)
        self._shapes = [shape_of(region) for region in regions]
        self._strangers: dict[Channel, tuple[str | None, float]] = {}
        """Connections that have proved nothing yet: from where and when they came."""
        self._clients: set[Channel] = set()
        self._refusals = RefusalLog(_log, "KV connections")
        listener = _listen(host)
        self.port: int = listener.getsockname()[1]
        self._loop = ChannelLoop("kv-tcp-serve", on_tick=self._sweep)
        self._loop.listen(listener, self._accept)
        self._loop.start()

    def check_alive(self) -> None:
        """Raise `TransferError` if the thread has failed."""
        self._loop.check_alive()

    def close(self) -> None:
        """Stop listening, cut all clients off."""
        self._loop.close()

    # --- in the loop's thread ---------------------------------------------------------------------------------------

    def _accept(self, sock: socket.socket) -> None:
        source = _source(sock)
        if len(self._clients) >= _MAX_CLIENTS:
            self._refusals.note(source, "too many clients")
            sock.close()
            return
        if len(self._strangers) >= _MAX_STRANGERS:
            # A client proves itself in a moment: who stands there longest is the least likely to be one.
            oldest = next(iter(self._strangers))
            self._loop.discard(oldest)
            self._forget(oldest, "too many strangers")
        channel = Channel(sock)
        self._strangers[channel] = (source, time.monotonic())
        self._loop.add(channel, self._serve(channel), lambda reason: self._forget(channel, reason))

    def _serve(self, channel: Channel) -> Session:
        hello = wire.make_hello()
        channel.send(hello)
        received = bytearray(wire.CLIENT_PROOF_BYTES)
        yield memoryview(received)
        proof = bytes(received)
        self._key.check_client_proof(self.export_id, hello, proof)
        channel.send(self._key.server_proof(self.export_id, hello, proof))
        session_key = self._key.session_key(self.export_id, hello, proof)
        del self._strangers[channel]
        self._clients.add(channel)
        sequence = 0
        while True:
            yield from self._answer(channel, session_key, sequence)
            sequence += 1

    def _answer(self, channel: Channel, session_key: bytes, sequence: int) -> Session:
        header = bytearray(wire.REQUEST_HEADER_BYTES)
        yield memoryview(header)
        body = bytearray(wire.request_body_bytes(header, sequence))
        yield memoryview(body)
        group, block_ids, extents = wire.decode_request(session_key, bytes(header), bytes(body))
        try:
            check_blocks(self._shapes, group, block_ids, whose="our")
            block_bytes = self._shapes[group].block_bytes
            check_extents(extents or (), block_bytes)
        except TransferError:
            channel.send(wire.encode_response(session_key, sequence, wire.STATUS_BAD_BLOCKS, 0))
            return
        num_bytes = len(block_ids) * (block_bytes if extents is None else packed_bytes(extents))
        channel.send(wire.encode_response(session_key, sequence, wire.STATUS_OK, num_bytes))
        for views in self._memory.outgoing(group, block_ids, extents):
            channel.send(*views)
            # No further request is looked at before this one is out: a client cannot make us queue without bound.
            yield None

    def _sweep(self) -> float | None:
        now_s = time.monotonic()
        for channel, (_, since_s) in tuple(self._strangers.items()):
            if now_s - since_s > _HANDSHAKE_S:
                self._loop.discard(channel)
                self._forget(channel, "no proof in time")
        for channel in tuple(self._clients):
            if channel.has_outgoing and now_s - channel.last_progress_s > _STALLED_S:
                self._loop.discard(channel)
                self._forget(channel, "stalled")
        self._refusals.flush()
        return _SWEEP_S if self._strangers or self._clients or self._refusals.is_pending else None

    def _forget(self, channel: Channel, reason: str) -> None:
        stranger = self._strangers.pop(channel, None)
        if stranger is not None:
            self._refusals.note(stranger[0], reason)
        self._clients.discard(channel)


def _source(sock: socket.socket) -> str | None:
    """Where a connection comes from; None if it has ended."""
    try:
        return str(sock.getpeername()[0])
    except OSError:
        return None


def _listen(host: str) -> socket.socket:
    if host in _WILDCARDS:
        raise TransferError(f"the KV server needs the address of this node to listen on, not {host!r}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, 0), family=family)
    except OSError as exc:
        raise TransferError(f"cannot listen on {host}: {exc}") from exc
