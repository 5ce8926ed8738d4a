"""LinkOutbox: an engine's messages, from its thread to the endpoint's. One wake-up of the event loop per step, not per
message."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from atom_cluster.engine.protocols import EngineOutput
from atom_cluster.errors import ProtocolError
from atom_cluster.messages.cluster import PeerAddress

logger = logging.getLogger(__name__)

Destination = str | PeerAddress


class LinkOutbox:
    """An `Outbox` whose messages are handed to `deliver` on the event loop, in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Destination, EngineOutput], None]) -> None:
        self._loop = loop
        self._deliver = deliver
        self._queue: deque[tuple[Destination, EngineOutput]] = deque()

    def send(self, destination: Destination, message: EngineOutput) -> None:
        """Queue a message. Called from the engine's thread."""
        # Append, then look: if something else is still there, the flush under way has yet to remove it and sees this
        # message afterwards. The other way round it might remove the last one in between, and nobody would wake it.
        self._queue.append((destination, message))
        if len(self._queue) == 1 and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        try:
            while self._queue:
                self._deliver_first()
        finally:
            if self._queue:
                # An error nobody foresaw, which the loop reports, must not hold up what is behind it.
                self._loop.call_soon(self._flush)

    def _deliver_first(self) -> None:
        # Look, deliver, then remove: until it is removed, `send` need not wake this loop.
        destination, message = self._queue[0]
        try:
            self._deliver(destination, message)
        except ProtocolError as exc:
            logger.error("a message to %s cannot be sent: %s", destination, exc)
        finally:
            self._queue.popleft()
