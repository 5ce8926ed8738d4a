"""What the two ends of the shared-memory channel say over their socket. The story is told in `shm_sender.py`."""

from __future__ import annotations

import select
import socket
import struct

from msgspec import Struct

TOKEN_BYTES = 32
HELLO = struct.Struct(f"<I{TOKEN_BYTES}s")
"""Follower to rank 0, first: its rank and the token."""
WELCOME = struct.Struct("<Q")
"""Rank 0 to follower, first, together with the memory's descriptor: the ring's size."""
RECORD = struct.Struct("<I?")
"""Rank 0 to follower: the next so many bytes of the ring are a fragment; whether it ends a frame."""
UPSTREAM = struct.Struct("<IB")
"""Follower to rank 0: length of the payload that follows, and what it is."""
IS_REPORT, IS_ACKNOWLEDGEMENT = 1, 2
ACKNOWLEDGEMENT = struct.Struct("<Q")
"""Everything before this position has been read."""
READ_BYTES = 65536


class ShmAddress(Struct, frozen=True, kw_only=True):
    """Where followers on rank 0's host connect, and the secret they show. Travels through Ray only."""

    name: bytes
    token: bytes


def wait_for_events(one: socket.socket, events: int, timeout_s: float | None) -> bool:
    """Whether a socket became ready, or broken, in time."""
    if one.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(one, events)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))
