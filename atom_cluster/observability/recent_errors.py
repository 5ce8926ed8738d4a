"""The last few errors of a process, for people: a ring of notes, equal ones counted. Knows nothing of who looks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from msgspec.structs import replace

from atom_cluster.messages.cluster import ErrorNote

MAX_NOTES = 8
MAX_MESSAGE_LENGTH = 200


class RecentErrors:
    """Notes of errors, oldest first. Errors of a kind that repeat the last text of it are one note with a count."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` is the time of day, in seconds since 1970."""
        self._clock = clock
        self._notes: deque[ErrorNote] = deque(maxlen=MAX_NOTES)

    def note(self, kind: str, message: str) -> None:
        """Something went wrong. The text is cut; it must be none that a client may not see."""
        message = message[:MAX_MESSAGE_LENGTH]
        now_s = round(self._clock(), 3)
        for index, known in enumerate(self._notes):
            if (known.kind, known.message) == (kind, message):
                del self._notes[index]
                self._notes.append(replace(known, at_s=now_s, count=known.count + 1))
                return
        self._notes.append(ErrorNote(at_s=now_s, kind=kind, message=message))

    def notes(self) -> tuple[ErrorNote, ...]:
        """At most `MAX_NOTES`."""
        return tuple(self._notes)
