"""Time as this process has lived it: what others' silence is measured by.

A process that gets no processor for a while, or is stopped, hears nothing meanwhile, whoever speaks. By the clock on
the wall everybody else has been silent then. So time counts only while somebody looks at it again and again: a longer
gap between two looks counts as one that is as long as they should be apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class LivedTime:
    """Seconds since it was made, never more than have passed. `look` from one thread, read from any."""

    def __init__(self, period_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`period_s`: how often somebody means to look, at least."""
        self._period_s = period_s
        self._clock = clock
        self._looked = (clock(), 0.0)
        """When it was last looked at, by the clock and by this time: one object, so that both belong together."""

    @property
    def now_s(self) -> float:
        """Now."""
        looked_s, lived_s = self._looked
        return lived_s + min(self._clock() - looked_s, self._period_s)

    def look(self) -> float:
        """Somebody is awake; now."""
        lived_s = self.now_s
        self._looked = (self._clock(), lived_s)
        return lived_s
