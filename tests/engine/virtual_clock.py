"""A clock for simulated runners on which waiting takes no time."""

from __future__ import annotations


class VirtualClock:
    """Time passes only by waiting. Runners that share one see each other's waits."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self._now_s += seconds
