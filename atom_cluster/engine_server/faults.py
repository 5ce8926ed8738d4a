"""FaultyDelivery: control messages between engines get lost, come twice or come late, as `faults` configures.

Only messages about tickets: they are what two engines tell each other, and what each has to do without when the other
dies. Requests and tokens travel between ingress and engine, over connections that lose nothing silently.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from atom_cluster.config.faults import FaultsConfig
from atom_cluster.engine.protocols import EngineOutput
from atom_cluster.engine_server.outbox import Destination
from atom_cluster.errors import ProtocolError
from atom_cluster.messages.transfer import (
    KvPublication,
    PrefillAccepted,
    PrefillFailed,
    PrefillOrder,
    TicketRelease,
    TicketRenew,
)

logger = logging.getLogger(__name__)

_BETWEEN_ENGINES = (PrefillOrder, PrefillAccepted, KvPublication, PrefillFailed, TicketRenew, TicketRelease)


class FaultyDelivery:
    """Stands before an engine's `deliver`. Called on the event loop."""

    def __init__(
        self,
        deliver: Callable[[Destination, EngineOutput], None],
        faults: FaultsConfig,
        *,
        loop: asyncio.AbstractEventLoop,
        name: str,
    ) -> None:
        """name: of the engine, so that engines differ in what they lose."""
        self._deliver = deliver
        self._faults = faults
        self._loop = loop
        self._random = random.Random(f"{faults.seed}/{name}")

    def __call__(self, destination: Destination, message: EngineOutput) -> None:
        """Deliver, or not."""
        if not isinstance(message, _BETWEEN_ENGINES):
            self._deliver(destination, message)
            return
        num_copies = 1 + (self._random.random() < self._faults.repeat_messages)
        if self._random.random() < self._faults.lose_messages:
            num_copies = 0
        for _ in range(num_copies):
            if self._faults.delay_messages_s:
                delay_s = self._random.uniform(0.0, self._faults.delay_messages_s)
                self._loop.call_later(delay_s, self._deliver_late, destination, message)
            else:
                self._deliver(destination, message)

    def _deliver_late(self, destination: Destination, message: EngineOutput) -> None:
        try:
            self._deliver(destination, message)
        except ProtocolError as exc:
            logger.error("a message to %s cannot be sent: %s", destination, exc)
