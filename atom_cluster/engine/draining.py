"""Draining: what an engine that was told to stop still does. It takes nothing new, and finishes or moves the rest.

A request is moved by ending it with `NotReady`, behind all tokens that its client has: the ingress places it again at
once, and whoever gets it goes on with the next token. That costs computing its tokens once more, so it is done

    at once         to requests that nothing was done for yet, which lose nothing by it
    at once         to requests that are sure to take longer than there is time
    when time is up to all others

How long a request is going to be is not known; what is sure is what it was told not to stop before. Prompts that are
computed for other engines end in the same way when time is up: decode computes them itself.
"""

from __future__ import annotations

import math

from atom_cluster.engine.request import Request
from atom_cluster.errors import NotReady


def draining() -> NotReady:
    """What clients and decode engines are told."""
    return NotReady("the replica is draining")


class Draining:
    """Whether the engine drains, and until when. Times are of the engine's clock."""

    def __init__(self) -> None:
        self._ends_s: float | None = None

    def begin(self, timeout_s: float, *, now_s: float) -> None:
        """Have nothing left after so long. A later call may shorten the time, not prolong it."""
        self._ends_s = min(now_s + timeout_s, math.inf if self._ends_s is None else self._ends_s)

    def refuse_new(self) -> None:
        """Raise `NotReady` if nothing may begin any more."""
        if self._ends_s is not None:
            raise draining()

    def is_over(self, now_s: float) -> bool:
        """Whether the rest is to be moved."""
        return self._ends_s is not None and now_s >= self._ends_s

    def leaves_at_once(self, request: Request, *, token_s: float, now_s: float) -> bool:
        """Whether there is no point in waiting for a request whose tokens take so long each; 0 if that is unknown."""
        if request.scheduled_s is None:
            return True
        return self._ends_s is not None and _surely_left(request) * token_s > self._ends_s - now_s


def _surely_left(request: Request) -> int:
    """Tokens before which its output does not end."""
    sampling = request.sampling
    fewest = sampling.max_tokens if sampling.ignore_eos and not sampling.stop_token_ids else sampling.min_tokens
    return max(0, (fewest or 0) - request.num_output)
