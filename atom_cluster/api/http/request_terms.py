"""What a request's headers ask of the cluster: how long its client waits, and how urgent it is.

Headers, because they mean the same on every endpoint, whatever its body looks like. Knows nothing of bodies.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from starlette.requests import Request

from atom_cluster.errors import InvalidRequest
from atom_cluster.units import Deadline

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
PRIORITY_HEADER = "X-Request-Priority"
MAX_TIMEOUT_MS = 24 * 3600 * 1000
MAX_PRIORITY = 100
"""Priorities are from its negative to it. Lower runs first, 0 is usual."""

_INTEGER = re.compile(r"-?[0-9]{1,10}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTerms:
    """When a request arrived, and on what terms it runs."""

    arrived_at_s: float
    """On the monotonic clock."""
    deadline: Deadline | None = None
    """When its client stops waiting, if it said so."""
    priority: int = 0

    @classmethod
    def of(cls, request: Request) -> RequestTerms:
        """The terms of a request that has just arrived. Raises `InvalidRequest` that names the header."""
        now_s = time.monotonic()
        timeout_ms = _integer(request, TIMEOUT_HEADER, 1, MAX_TIMEOUT_MS)
        priority = _integer(request, PRIORITY_HEADER, -MAX_PRIORITY, MAX_PRIORITY)
        return cls(
            arrived_at_s=now_s,
            deadline=None if timeout_ms is None else Deadline(now_s + timeout_ms / 1000),
            priority=priority or 0,
        )

    def with_priority(self, priority: int | None) -> RequestTerms:
        """These, with the priority that the body names, if it names one: it wins over the header's."""
        if priority is None:
            return self
        return RequestTerms(arrived_at_s=self.arrived_at_s, deadline=self.deadline, priority=priority)


def _integer(request: Request, header: str, least: int, most: int) -> int | None:
    values = request.headers.getlist(header)
    if not values:
        return None
    if len(values) > 1 or not _INTEGER.fullmatch(values[0]) or not least <= int(values[0]) <= most:
        raise InvalidRequest(f"the header `{header}` must be one integer from {least} to {most}", param=header)
    return int(values[0])
