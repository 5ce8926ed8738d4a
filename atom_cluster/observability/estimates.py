"""Running estimates of how long something takes, by its size: steps by their prompt tokens, handoffs by their tokens.

What takes how long bends: a device computes a few tokens in the time of one, and thousands in proportion. So there is
one estimate for each power of two, and what lies between two of them is on the line through both. A table of points is
plain numbers: it can be sent to somebody else, and asked for any size there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = tuple[tuple[int, float], ...]
"""(size, seconds), ascending in the first and never falling in the second."""

FORGET_S = 300.0
"""A bucket that nothing fell into for this long is empty again: what it said may be true no more, and if it said that
something is slow, that is why nobody tried."""
_WEIGHT = 1 / 8
"""Of the newest observation, once there are some."""
_NUM_FIRST = 3
"""Of so many observations the fastest counts: a device's first step of a size may have to prepare what later ones find
prepared."""


@dataclass(slots=True)
class _Bucket:
    size: float
    seconds: float
    noted_s: float
    num_noted: int = 1


class TimesBySize:
    """Decaying means in buckets of a factor of two. At most 64 buckets, each of four numbers."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}

    def note(self, size: int, seconds: float, *, now_s: float) -> None:
        """Something of a positive size took so long."""
        key = min(size.bit_length(), 64)
        bucket = self._buckets.get(key)
        if bucket is None or now_s - bucket.noted_s > FORGET_S:
            self._buckets[key] = _Bucket(size, seconds, now_s)
            return
        bucket.num_noted += 1
        bucket.noted_s = now_s
        if bucket.num_noted <= _NUM_FIRST:
            if seconds / size < bucket.seconds / bucket.size:
                bucket.size, bucket.seconds = size, seconds
            return
        bucket.size += _WEIGHT * (size - bucket.size)
        bucket.seconds += _WEIGHT * (seconds - bucket.seconds)

    def points(self, now_s: float, *, doubt_s: float = math.inf) -> Points:
        """What is known now. Seconds are rounded to three digits, so that points that hardly changed are equal.

        doubt_s: an estimate that nothing confirms halves each time that so much has passed, not in between, so that
        points of somebody idle are equal for long. Whoever takes the faster of two ways by these points then tries the
        other one again, some time after it seemed to be slow.
        """
        for key, bucket in tuple(self._buckets.items()):
            if now_s - bucket.noted_s > FORGET_S:
                del self._buckets[key]
        buckets = [self._buckets[key] for key in sorted(self._buckets)]
        # Less of it cannot take more: what says so was measured at a worse time, perhaps the first time of all.
        believed_s = list(itertools.accumulate((bucket.seconds for bucket in reversed(buckets)), min))[::-1]
        points: list[tuple[int, float]] = []
        for bucket, seconds in zip(buckets, believed_s):
            seconds = float(f"{seconds * 0.5 ** ((now_s - bucket.noted_s) // doubt_s):.3g}")
            points.append((round(bucket.size), max(seconds, points[-1][1] if points else 0.0)))
        return tuple(points)


def seconds_of(points: Sequence[tuple[int, float]], size: float) -> float:
    """Seconds for a size, of a table with at least one point. Outside of the table they are in proportion to the size.

    Never falls as the size grows.
    """
    previous_size, previous_s = 0.0, 0.0
    for point_size, point_s in points:
        if size <= point_size:
            share = (size - previous_size) / (point_size - previous_size) if point_size > previous_size else 1.0
            return previous_s + share * (point_s - previous_s)
        previous_size, previous_s = point_size, point_s
    return previous_s * size / previous_size if previous_size else previous_s


def largest_within(points: Sequence[tuple[int, float]], seconds: float) -> float:
    """The size that takes so long, of a table with at least one point: the inverse of `seconds_of`."""
    previous_size, previous_s = 0.0, 0.0
    for point_size, point_s in points:
        if seconds < point_s:
            return previous_size + (seconds - previous_s) / (point_s - previous_s) * (point_size - previous_size)
        previous_size, previous_s = point_size, point_s
    return previous_size * seconds / previous_s if previous_s else previous_size
