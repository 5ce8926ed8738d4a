"""What a request's headers ask of the cluster: how long its client waits, and how urgent it is.

Headers, because they mean the same on every endpoint, whatever its body looks like. Knows nothing of bodies.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

from starlette.requests import Request

from atom_cluster.config.protection import MAX_PRIORITY
from atom_cluster.errors import Forbidden, InvalidRequest
from atom_cluster.units import Deadline

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
PRIORITY_HEADER = "X-Request-Priority"
MAX_TIMEOUT_MS = 24 * 3600 * 1000
PRIORITY_LIMIT = "priority_limit"
"""Where a request's state has the lowest priority that its key may ask for; there is none where any will do."""

_INTEGER = re.compile(r"-?[0-9]{1,10}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTerms:
    """When a request arrived, and on what terms it runs."""

    arrived_at_s: float
    """On the monotonic clock."""
    deadline: Deadline | None = None
    """When its client stops waiting, if it said so."""
    priority: int = 0
    priority_limit: int = -MAX_PRIORITY
    """The lowest that its key may ask for."""

    @classmethod
    def of(cls, request: Request) -> RequestTerms:
        """The terms of a request that has just arrived; where its key may not ask for the usual priority, the most
        urgent that it may. Raises `InvalidRequest` or `Forbidden` that names the header."""
        now_s = time.monotonic()
        timeout_ms = _integer(request, TIMEOUT_HEADER, 1, MAX_TIMEOUT_MS)
        priority = _integer(request, PRIORITY_HEADER, -MAX_PRIORITY, MAX_PRIORITY)
        limit = request.scope.get("state", {}).get(PRIORITY_LIMIT, -MAX_PRIORITY)
        if priority is not None:
            _check_priority(priority, limit, f"the header `{PRIORITY_HEADER}`", param=PRIORITY_HEADER)
        return cls(
            arrived_at_s=now_s,
            deadline=None if timeout_ms is None else Deadline(now_s + timeout_ms / 1000),
            priority=max(0, limit) if priority is None else priority,
            priority_limit=limit,
        )

    def with_priority(self, priority: int | None) -> RequestTerms:
        """These, with the priority that the body names, if it names one: it wins over the header's.

        Raises `Forbidden` that names the field.
        """
        if priority is None:
            return self
        _check_priority(priority, self.priority_limit, "`priority`", param="priority")
        return replace(self, priority=priority)


def _check_priority(priority: int, limit: int, what: str, *, param: str) -> None:
    if priority < limit:
        raise Forbidden(
            f"{what}: the API key may ask for {limit} and less urgent, which is above; got {priority}", param=param
        )


def _integer(request: Request, header: str, least: int, most: int) -> int | None:
    values = request.headers.getlist(header)
    if not values:
        return None
    if len(values) > 1 or not _INTEGER.fullmatch(values[0]) or not least <= int(values[0]) <= most:
        raise InvalidRequest(f"the header `{header}` must be one integer from {least} to {most}", param=header)
    return int(values[0])
