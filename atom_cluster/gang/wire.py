"""What rank 0 and its followers say to each other, as msgpack. Knows no channel and no rank's state."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from atom_cluster.errors import ProtocolError
from atom_cluster.messages.steps import StepPlan
from atom_cluster.messages.transfer import RankReport


class Execute(Struct, frozen=True, tag="execute"):
    """Rank 0 to followers: run this plan."""

    plan: StepPlan


class Dismiss(Struct, frozen=True, tag="dismiss"):
    """Rank 0 to followers: there will be no more plans; release everything."""


class RankReports(Struct, frozen=True, tag="reports"):
    """A follower to rank 0: its KV commands, profiler windows and compilations of grammars that ended."""

    reports: tuple[RankReport, ...]


class RankFailed(Struct, frozen=True, tag="failed"):
    """A follower to rank 0: it cannot go on."""

    message: str


ToFollower = Execute | Dismiss
FromFollower = RankReports | RankFailed

_encoder = msgspec.msgpack.Encoder()
_to_follower: msgspec.msgpack.Decoder[ToFollower] = msgspec.msgpack.Decoder(ToFollower)
_from_follower: msgspec.msgpack.Decoder[FromFollower] = msgspec.msgpack.Decoder(FromFollower)


def encode(message: ToFollower | FromFollower) -> bytes:
    """Bytes of a message, never empty."""
    return _encoder.encode(message)


def decode_to_follower(frame: bytes) -> ToFollower:
    """What rank 0 said. Raises `ProtocolError`."""
    try:
        return _to_follower.decode(frame)
    except msgspec.DecodeError as exc:
        raise ProtocolError(f"malformed frame from rank 0: {exc}") from exc


def decode_from_follower(frame: bytes) -> FromFollower:
    """What a follower said. Raises `ProtocolError`."""
    try:
        return _from_follower.decode(frame)
    except msgspec.DecodeError as exc:
        raise ProtocolError(f"malformed frame from a follower: {exc}") from exc
