"""When somebody who found a queue full may come back: from how fast it has been emptying, and how many are ahead.

`Retry-After` of a second, whatever the load, brings everybody who was refused back at once, again and again, and each
of them costs a tokenized prompt. So the answer is the time until about all who are ahead have had their turn, at the
pace of the last departures. It is spread over the half before that, so that those who are refused together come back
one by one, and find room when they do. Knows nothing of what waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

SHORTEST_S = 1.0
"""Nobody is told to come back sooner. `Retry-After` is in whole seconds."""
LONGEST_S = 60.0
"""Nor later: who waits longer finds another queue, and clients (OpenAI's) do as they like with longer times."""
_NUM_RECENT = 16
"""The pace is that of about so many departures: many requests end in one step, and then none for a while."""


class Departures:
    """Pace at which one queue's places come free. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, random: Random | None = None) -> None:
        self._clock = clock
        self._random = Random() if random is None else random
        self._num_noted = 0
        self._mean_s = 0.0
        self._since_s: float | None = None
        """The last departure, or when the queue was first seen full; None while nobody waits."""

    def note(self, *, is_busy: bool) -> None:
        """A place has come free. `is_busy`: somebody waits for it. Time in which nobody does says nothing of the pace:
        who has not come cannot leave."""
        now_s = self._clock()
        if self._since_s is not None:
            self._num_noted += 1
            self._mean_s += (now_s - self._since_s - self._mean_s) / min(self._num_noted, _NUM_RECENT)
        self._since_s = now_s if is_busy else None

    def retry_after_s(self, num_ahead: int) -> float:
        """Seconds, `SHORTEST_S` to `LONGEST_S`, after which one who has found the queue full is to come back."""
        now_s = self._clock()
        if self._since_s is None:
            self._since_s = now_s
        waited_s = now_s - self._since_s
        if self._num_noted:
            # A departure that is late counts as if it came now: a queue that stands still is told from a slow one.
            late_s = max(0.0, waited_s - self._mean_s)
            expected_s = num_ahead * (self._mean_s + late_s / _NUM_RECENT)
        else:
            expected_s = waited_s  # nobody has left yet: as long again
        expected_s = min(max(expected_s, 2 * SHORTEST_S), LONGEST_S)
        return self._random.uniform(expected_s / 2, expected_s)
