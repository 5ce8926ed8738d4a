"""Gate: decides of each request whether it may pass, by its key, what that key has used, and what is open here.

Everything is decided from the headers, before a body is read. Knows nothing of ASGI.
"""

from __future__ import annotations

import base64
import binascii
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atom_cluster.api.protection.access import Access, may_use
from atom_cluster.api.protection.budgets import Admission, Budget
from atom_cluster.api.protection.key_file import KeyFile
from atom_cluster.api.protection.keys import KeyRing
from atom_cluster.config.protection import MAX_PRIORITY, ApiKeyEntry, ProtectionConfig
from atom_cluster.errors import AtomClusterError, Forbidden, HeadersTooLarge, Overloaded, RateLimited, Unauthorized
from atom_cluster.observability.departures import Departures
from atom_cluster.observability.metrics import KEY_REQUESTS, KEY_TOKENS, MetricSink
from atom_cluster.observability.refusals import RefusalLog

logger = logging.getLogger(__name__)

ANONYMOUS = "anonymous"
"""Name of all clients together where there are no keys, and of those without a valid one."""
BYTES_PER_TOKEN = 4
"""Of bodies, to estimate a prompt before it is read: English text and JSON around it have about so many."""
_MAX_LENGTH_DIGITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What the gate looks at of a request."""

    method: str
    target_bytes: int
    """Of path and query."""
    headers: Sequence[tuple[bytes, bytes]]
    """Names in lower case."""
    access: Access
    """What its route needs."""
    client: str | None
    """Address, for the log."""


@dataclass(slots=True)
class Pass:
    """Leave to pass, to be handed back to `Gate.close`."""

    key_name: str
    admission: Admission | None
    """Of requests that count: POST requests that are not an admin's."""
    headers: dict[str, str]
    """To be sent with the answer."""
    priority_limit: int = -MAX_PRIORITY
    """The lowest priority that it may ask for."""


class Gate:
    """All that this ingress knows of keys and their use. Used from one event loop."""

    def __init__(
        self,
        config: ProtectionConfig,
        *,
        metrics: MetricSink,
        api_keys_file: Path | None = None,
        num_ingresses: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """api_keys_file: where `config` names none. num_ingresses: that share the limits of a key.

        Raises `ConfigError` when the file of keys cannot be used.
        """
        path = api_keys_file if config.api_keys_file is None else Path(config.api_keys_file)
        self._key_file = None if path is None else KeyFile(path, poll_s=config.api_keys_poll_s, clock=clock)
        self._config = config
        self._metrics = metrics
        self._num_ingresses = num_ingresses
        self._clock = clock
        self._ring: KeyRing | None = None
        self._budgets: dict[str, Budget] = {}
        self._num_open = 0
        self._departures = Departures(clock)
        self._refusals = RefusalLog(logger, "HTTP requests")

    async def enter(self, visit: Visit) -> Pass:
        """Let a request in. Raises the error to answer it with: `Unauthorized`, `Forbidden`, `RateLimited`,
        `Overloaded` or `HeadersTooLarge`."""
        name = ANONYMOUS
        try:
            self._check_size(visit)
            entry = await self._identify(visit)
            if entry is not None:
                name = entry.name
                _check_role(entry, visit.access)
            found = self._admit(visit, entry, name)
        except AtomClusterError as exc:
            reason = exc.limit if isinstance(exc, RateLimited) else exc.code or "refused"
            self._metrics.inc(KEY_REQUESTS, key=name, outcome=reason)
            self._refusals.note(visit.client, f"{reason} ({name})")
            raise
        self._metrics.inc(KEY_REQUESTS, key=name, outcome="admitted")
        return found

    def close(self, found: Pass) -> None:
        """The request is over."""
        admission = found.admission
        if admission is None:
            return
        # Below half, requests leave no faster than they come.
        self._departures.note(is_busy=2 * self._num_open > self._config.max_open_requests)
        self._num_open -= 1
        admission.close()
        if admission.num_prompt_tokens:
            self._metrics.inc(KEY_TOKENS, admission.num_prompt_tokens, key=found.key_name, kind="prompt")
        if admission.num_output_tokens:
            self._metrics.inc(KEY_TOKENS, admission.num_output_tokens, key=found.key_name, kind="output")

    def _check_size(self, visit: Visit) -> None:
        limit = self._config.max_headers
        if len(visit.headers) > limit:
            raise HeadersTooLarge(f"a request has at most {limit} headers")
        limit = self._config.max_header_bytes
        if visit.target_bytes + sum(len(name) + len(value) for name, value in visit.headers) > limit:
            raise HeadersTooLarge(f"headers and path of a request have at most {limit} bytes together")

    async def _identify(self, visit: Visit) -> ApiKeyEntry | None:
        """The key's entry; None where no key is needed."""
        if self._key_file is None or visit.access == "open":
            return None
        ring = await self._key_file.keys()
        if ring is not self._ring:
            self._ring = ring
            names = {entry.name for entry in ring.entries}
            self._budgets = {name: budget for name, budget in self._budgets.items() if name in names}
        key = presented_key(visit.method, visit.headers)
        if key is None:
            raise Unauthorized("give an API key: `Authorization: Bearer KEY`, or `x-api-key: KEY`", code="no_api_key")
        entry = ring.find(key)
        if entry is None:
            raise Unauthorized("the API key is not valid")
        return entry

    def _admit(self, visit: Visit, entry: ApiKeyEntry | None, name: str) -> Pass:
        if visit.method != "POST" or visit.access in ("open", "admin"):
            return Pass(name, None, {})
        if self._num_open >= self._config.max_open_requests:
            retry_after_s = self._departures.retry_after_s(self._num_open)
            raise Overloaded(f"{self._num_open} requests are being answered already", retry_after_s=retry_after_s)
        budget = self._budget(entry, name)
        admission = budget.admit(_estimated_tokens(visit.headers))
        self._num_open += 1
        limit = -MAX_PRIORITY if entry is None else entry.priority_limit(self._config.most_urgent_priority)
        return Pass(name, admission, budget.headers(), limit)

    def _budget(self, entry: ApiKeyEntry | None, name: str) -> Budget:
        default = self._config.limits
        limits = default if entry is None else entry.or_else(default)
        budget = self._budgets.get(name)
        if budget is None or budget.limits != limits:
            owner = "all clients together" if entry is None else f"the API key {name}"
            budget = Budget(owner, limits, num_sharers=self._num_ingresses, clock=self._clock)
            self._budgets[name] = budget
        return budget


def _check_role(entry: ApiKeyEntry, access: Access) -> None:
    if not may_use(entry.role, access):
        raise Forbidden(f"this needs an API key with the role {access}; {entry.name} is {entry.role}")


def presented_key(method: str, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """The key in a request's headers, whichever way it is given; None without one.

    Basic credentials are for people's browsers: any user name, and the key as password. A browser sends them along
    whoever made it send the request, so they count for reading only.
    """
    found: Mapping[bytes, bytes] = dict(headers)
    scheme, _, value = found.get(b"authorization", b"").decode("latin-1").strip().partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer" and value:
        return value
    own = found.get(b"x-api-key", b"").decode("latin-1").strip()
    if own:
        return own
    return _basic_password(value) if scheme.lower() == "basic" and method in ("GET", "HEAD") else None


def _basic_password(value: str) -> str | None:
    try:
        text = base64.b64decode(value, validate=True).decode("latin-1")
    except (binascii.Error, ValueError):
        return None
    return text.partition(":")[2] or None


def _estimated_tokens(headers: Sequence[tuple[bytes, bytes]]) -> int:
    length = dict(headers).get(b"content-length", b"0")
    return int(length) // BYTES_PER_TOKEN if length.isdigit() and len(length) <= _MAX_LENGTH_DIGITS else 0
