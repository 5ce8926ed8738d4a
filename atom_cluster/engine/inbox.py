"""What an engine has been told and has not looked at yet. The only part of an engine that several threads touch."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from atom_cluster.engine.protocols import EngineInput


@dataclass(frozen=True, slots=True)
class Lost:
    """A peer is gone, whatever it was to us."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class SnapshotWanted:
    """The router wants to know all of the cache."""


@dataclass(frozen=True, slots=True)
class DrainWanted:
    """The engine is to have nothing left after so long."""

    timeout_s: float


Item = tuple[str, EngineInput | Lost | SnapshotWanted | DrainWanted, float]
"""Who sent it, what, and when it came, on the engine's clock, before it was looked at."""


@dataclass(slots=True)
class Inbox:
    """Items in order of arrival."""

    clock: Callable[[], float] = time.monotonic
    _items: queue.SimpleQueue[Item] = field(default_factory=queue.SimpleQueue)

    def __len__(self) -> int:
        return self._items.qsize()

    def put(self, source: str, message: EngineInput | Lost | SnapshotWanted | DrainWanted) -> None:
        """Add an item and wake up `drain`."""
        self._items.put((source, message, self.clock()))

    def drain(self, wait_s: float) -> list[Item]:
        """Everything that is there; waits for the first item if there is none."""
        items: list[Item] = []
        try:
            items.append(self._items.get(timeout=wait_s) if wait_s > 0 else self._items.get_nowait())
            while True:
                items.append(self._items.get_nowait())
        except queue.Empty:
            return items
