"""Small arithmetic and unit constants used everywhere. Knows nothing of the domain."""

from __future__ import annotations

import time
from dataclasses import dataclass

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer >= numerator / denominator, for non-negative integers."""
    return -(-numerator // denominator)


def align_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is >= value."""
    return ceil_div(value, multiple) * multiple


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on this process's monotonic clock. Never sent to another process: clocks differ, send seconds left."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline `seconds` from now."""
        return cls(time.monotonic() + seconds)

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - time.monotonic())

    @property
    def has_passed(self) -> bool:
        """Whether the deadline is over."""
        return time.monotonic() >= self.at_s
