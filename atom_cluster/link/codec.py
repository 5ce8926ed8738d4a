"""Cluster messages as bytes: msgpack with a type tag, size-bounded both ways. Nothing is ever unpickled."""

from __future__ import annotations

import msgspec

from atom_cluster.errors import ProtocolError
from atom_cluster.messages.cluster import (
    CacheEvents,
    CacheSnapshot,
    ReplicaLoad,
    RequestDone,
    RouteDecision,
    RouteQuery,
    SnapshotRequest,
    StatusAnswer,
    StatusRequest,
)
from atom_cluster.messages.profile import ProfileAnswer, StartProfile, StopProfile
from atom_cluster.messages.requests import CancelRequest, EngineRequest, Ping, Pong, TokenBatch
from atom_cluster.messages.timing import TimelineAnswer, TimelineQuery
from atom_cluster.messages.transfer import (
    KvPublication,
    PrefillAccepted,
    PrefillFailed,
    PrefillOrder,
    TicketRelease,
    TicketRenew,
)
from atom_cluster.units import MiB

MAX_MESSAGE_BYTES = 64 * MiB
"""Largest message: a snapshot of some seven million cached blocks, or a prompt of as many tokens."""

Message = (
    EngineRequest
    | CancelRequest
    | TokenBatch
    | Ping
    | Pong
    | PrefillOrder
    | PrefillAccepted
    | KvPublication
    | PrefillFailed
    | TicketRenew
    | TicketRelease
    | ReplicaLoad
    | CacheEvents
    | CacheSnapshot
    | SnapshotRequest
    | RouteQuery
    | RouteDecision
    | RequestDone
    | StatusRequest
    | StatusAnswer
    | StartProfile
    | StopProfile
    | ProfileAnswer
    | TimelineQuery
    | TimelineAnswer
)
"""Everything that travels between processes of a cluster."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Bytes of a message. Raises `ProtocolError` if it is too large to send."""
    frame = _encoder.encode(message)
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{type(message).__name__} takes {len(frame)} bytes, over the limit of {MAX_MESSAGE_BYTES}")
    return frame


def decode(frame: bytes) -> Message:
    """The message in a frame. Raises `ProtocolError` for anything that is not exactly one known message."""
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(frame)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        return _decoder.decode(frame)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ProtocolError(f"malformed message: {exc}") from exc
