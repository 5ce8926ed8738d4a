"""When requests are sent, as seconds after the first one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np


def rate_arrivals(rate_per_s: float, *, burstiness: float, seed: int) -> Iterator[float]:
    """`rate_per_s` requests a second on average, without end; all at once for an infinite rate.

    Intervals are gamma distributed with this shape: 1 is a Poisson process, below 1 more bursty, above 1 more even.
    Raises ValueError unless both are positive.
    """
    if not (rate_per_s > 0 and burstiness > 0):
        raise ValueError("--request-rate and --burstiness have to be positive")
    rng = np.random.default_rng([seed, 1])
    at_s = 0.0
    while True:
        yield at_s
        if not math.isinf(rate_per_s):
            at_s += float(rng.gamma(burstiness, 1.0 / (rate_per_s * burstiness)))


def burst_arrivals(burst_size: int, interval_s: float) -> Iterator[float]:
    """`burst_size` requests at once, again after every interval, without end."""
    if burst_size < 1 or interval_s < 0:
        raise ValueError("--burst-size has to be at least 1 and --burst-interval not negative")
    index = 0
    while True:
        yield index // burst_size * interval_s
        index += 1
