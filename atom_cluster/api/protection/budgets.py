"""Budgets: how much of the API one key, or everybody together, may use at this ingress.

Each limit is a token bucket (a bucket holds a minute's worth and is refilled evenly), which may go below zero: how many
tokens a request really used is known when it ends, and what it took beyond the estimate is owed. So a budget is
overdrawn at most by the requests that run at the same time. Libraries for rate limits take no debts; hence these lines.
Knows nothing of HTTP, keys or other ingresses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal

from atom_cluster.config.protection import RateLimits
from atom_cluster.errors import RateLimited
from atom_cluster.observability.departures import Departures

Clock = Callable[[], float]
Limit = Literal["requests_per_minute", "tokens_per_minute", "concurrent_requests"]


class Bucket:
    """A minute's worth of something, refilled evenly."""

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self.capacity = max(1.0, per_minute)
        self._rate_per_s = per_minute / 60
        self._clock = clock
        self._level = self.capacity
        self._at_s = clock()

    @property
    def level(self) -> float:
        """What is left; below zero what is owed."""
        now_s = self._clock()
        self._level = min(self.capacity, self._level + (now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s
        return self._level

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there, at most a full bucket; 0 if it is."""
        return max(0.0, min(amount, self.capacity) - self.level) / self._rate_per_s

    def take(self, amount: float) -> None:
        """Take an amount, whether it is there or not; a negative one gives back."""
        self._level = min(self.capacity, self.level - amount)


class Budget:
    """The three limits of one key. Used from one event loop."""

    def __init__(self, owner: str, limits: RateLimits, *, num_sharers: int = 1, clock: Clock = time.monotonic) -> None:
        """owner: named in errors. num_sharers: ingresses, each of which enforces its share of the limits."""
        self.limits = limits
        self._owner = owner
        self._requests = _bucket(limits.requests_per_minute, num_sharers, clock)
        self._tokens = _bucket(limits.tokens_per_minute, num_sharers, clock)
        self._max_open = limits.concurrent_requests and math.ceil(limits.concurrent_requests / num_sharers)
        self._num_open = 0
        self._departures = Departures(clock)

    def admit(self, num_estimated_tokens: int) -> Admission:
        """Take what a request needs. Raises `RateLimited`, having taken nothing, when that is not there."""
        if self._max_open is not None and self._num_open >= self._max_open:
            wait_s = self._departures.retry_after_s(self._num_open)
            raise self._refusal("concurrent_requests", "requests at the same time", wait_s)
        if self._requests is not None and (wait_s := self._requests.wait_s(1)):
            raise self._refusal("requests_per_minute", "requests per minute", wait_s)
        if self._tokens is not None and (wait_s := self._tokens.wait_s(max(1, num_estimated_tokens))):
            raise self._refusal("tokens_per_minute", "tokens per minute", wait_s)
        if self._requests is not None:
            self._requests.take(1)
        self._num_open += 1
        return Admission(self, num_estimated_tokens)

    def headers(self) -> dict[str, str]:
        """`x-ratelimit-*` of the limits that there are, as OpenAI's API names them."""
        found: dict[str, str] = {}
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{kind}"] = str(int(bucket.capacity))
                found[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.level)))
                found[f"x-ratelimit-reset-{kind}"] = f"{bucket.wait_s(bucket.capacity):.3f}s"
        return found

    def take_tokens(self, amount: int) -> None:
        """Take tokens, or give back a negative amount."""
        if self._tokens is not None:
            self._tokens.take(amount)

    def end_request(self) -> None:
        """One that was admitted is over."""
        self._departures.note(is_busy=self._max_open is not None and 2 * self._num_open > self._max_open)
        self._num_open -= 1

    def _refusal(self, limit: Limit, what: str, retry_after_s: float) -> RateLimited:
        number = getattr(self.limits, limit)
        return RateLimited(f"{self._owner}: at most {number} {what}", limit=limit, retry_after_s=retry_after_s)


class Admission:
    """An admitted request: what was taken for it, and what it turns out to use."""

    def __init__(self, budget: Budget, num_estimated_tokens: int) -> None:
        self._budget = budget
        self._num_taken = num_estimated_tokens
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        budget.take_tokens(num_estimated_tokens)

    def note_used(self, *, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """What was used, besides what was noted before."""
        self.num_prompt_tokens += num_prompt_tokens
        self.num_output_tokens += num_output_tokens

    def close(self) -> None:
        """The request is over: what it used takes the place of the estimate. To be called once."""
        self._budget.take_tokens(self.num_prompt_tokens + self.num_output_tokens - self._num_taken)
        self._budget.end_request()


def _bucket(per_minute: int | None, num_sharers: int, clock: Clock) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute / num_sharers, clock)
