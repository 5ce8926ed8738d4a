"""A MORI-IO engine that reads, and the peers opened in it: what would block runs in threads here.

There are two such things. Opening a peer waits for the peer's control port. Closing the engine waits for openings and
for the hardware, and is the only proof that nothing is written any more (`mori_engine.py` says why).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.mori_engine import MAX_OPENINGS, ReadingEngine, RemoteRank

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Opening:
    """One attempt to open a peer; `is_ended` is written last."""

    peer: RemoteRank
    is_suspect: bool = False
    error: str | None = None
    ended_s: float = 0.0
    is_ended: bool = False
    is_counted: bool = False
    """Whether the peer was blamed for its failure."""

    @property
    def has_failed(self) -> bool:
        """Whether it is over, and the peer cannot be read from."""
        return self.is_ended and self.error is not None

    def fail(self, error: str) -> None:
        """The peer can be read from no more."""
        self.error, self.ended_s = error, time.monotonic()
        self.is_ended = True


class Reader:
    """Owns an engine, made when it is first needed, and its threads. Called from one thread."""

    def __init__(self, make_engine: Callable[[], ReadingEngine]) -> None:
        self.openings: dict[str, Opening] = {}
        """The latest attempt, by name of the peer."""
        self.engine: ReadingEngine | None = None
        self.failure: Exception | None = None
        """Why it could not be closed: what it was writing to may still change."""
        self._make_engine = make_engine
        self._make_lock = threading.Lock()
        self._num_openings = 0
        self._stop = threading.Event()
        self._openers: list[threading.Thread] = []
        self._closer: threading.Thread | None = None

    @property
    def is_used_up(self) -> bool:
        """Whether it has opened as many peers as it may."""
        return self._num_openings >= MAX_OPENINGS

    def is_broken(self, peer: RemoteRank) -> bool:
        """Whether only another engine may be able to read from the peer."""
        return self.engine is not None and self.engine.is_broken(peer)

    def open(self, name: str, peer: RemoteRank, *, is_suspect: bool) -> None:
        """Begin to open a peer; `openings[name]` tells the outcome. Not when it `is_used_up`.

        is_suspect: whether it failed before.
        """
        opening = self.openings[name] = Opening(peer, is_suspect)
        slot, self._num_openings = self._num_openings, self._num_openings + 1
        opener = threading.Thread(target=self._open, args=(opening, slot), daemon=True)
        opener.name = f"kv-mori-open-{slot}"
        self._openers = [thread for thread in self._openers if thread.is_alive()] + [opener]
        opener.start()

    def close(self) -> None:
        """Begin to close the engine; call nothing else afterwards but `has_closed` and `join`."""
        self._stop.set()
        self._closer = threading.Thread(target=self._close, name="kv-mori-close", daemon=True)
        self._closer.start()

    @property
    def has_closed(self) -> bool:
        """Whether it is over with the engine: with no `failure`, nothing is written by it any more."""
        return self._closer is not None and not self._closer.is_alive()

    def join(self) -> None:
        """Wait until `has_closed`."""
        if self._closer is not None:
            self._closer.join()

    # --- threads --------------------------------------------------------------------------------------------------

    def _open(self, opening: Opening, slot: int) -> None:
        try:
            with self._make_lock:
                if self.engine is None:
                    self.engine = self._make_engine()
            self.engine.open(opening.peer, slot, self._stop, is_suspect=opening.is_suspect)
            opening.is_ended = True
        except TransferError as exc:
            opening.fail(str(exc))
        except Exception as exc:  # noqa: BLE001 a supervisor: its read is told
            _log.exception("opening a peer through MORI-IO failed")
            opening.fail(f"{type(exc).__name__}: {exc}")

    def _close(self) -> None:
        try:
            for opener in self._openers:
                opener.join()
            if self.engine is not None:
                self.engine.close()
        except Exception as exc:  # noqa: BLE001 a supervisor: told by the transport's `poll`
            _log.exception("a MORI-IO engine could not be closed")
            self.failure = exc
