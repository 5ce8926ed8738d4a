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
        # A deque's append and the emptiness check are atomic; the loop's side empties the queue before it returns, so
        # a message that finds it non-empty is covered by the wake-up under way.
        is_first = not self._queue
        self._queue.append((destination, message))
        if is_first and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        while self._queue:
            # Look, deliver, then remove: `send` must not see an empty queue while this loop is about to stop.
            destination, message = self._queue[0]
            try:
                self._deliver(destination, message)
            except ProtocolError as exc:
                logger.error("a message to %s cannot be sent: %s", destination, exc)
            self._queue.popleft()
