"""How soon both engines are free of a request whose client leaves, in whichever phase the request is.

One client at a time: it asks, the engines are watched until the request is in the phase, the connection is closed, and
the engines are watched until neither holds a block, a ticket or a request of it any more. Times are from the close to
the answer in which the engine said so; they include the client's end of the connection being noticed by the proxy.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from atom_cluster.messages.cluster import EngineStatus
from atom_cluster.tools.drill.cluster import DrillError, RunningCluster
from atom_cluster.tools.drill.watch import EngineWatch, addresses_of, num_held

LIMIT_S = 1.0
"""The promise, for 99 of 100."""
NEEDS: dict[str, Any] = {
    "scheduler": {"max_num_batched_tokens": 128},
    "cache": {"num_blocks": 48},
    "faults": {"delay_reads_s": 0.3},
}
"""Of the cluster. Prompts take several steps; two long ones do not fit into the cache; reads are slow enough to be
caught."""
_SETTLE_TIMEOUT_S = 30.0
_REACH_TIMEOUT_S = 20.0
_READ_TIMEOUT_S = 60.0
_MAX_MISSES = 3
"""Times that a phase was over before it was seen, per sample wanted."""
_LONG, _MEDIUM, _SHORT = 420, 300, 100
"""Prompt tokens: more than half of the cache, several steps, one step."""


@dataclass(frozen=True, slots=True)
class Both:
    """Both engines at one moment."""

    prefill: EngineStatus
    decode: EngineStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Where a request is when its client leaves."""

    name: str
    what: str
    num_tokens: int
    """Of the prompt."""
    is_reached: Callable[[Both], bool] | None
    """None: when the client has its last token."""
    max_tokens: int = 60
    filler_tokens: int = 0
    """Prompt of another request that makes this one wait; its client leaves at the same time. 0: there is none."""
    is_filler_in: Callable[[Both], bool] = field(default=lambda both: True)
    """When to send the request itself."""


def _arriving(status: EngineStatus) -> int:
    return status.blocks_by_state.get("arriving", 0)


def _leased(status: EngineStatus) -> int:
    return status.blocks_by_state.get("leased", 0)


PHASES = (
    Phase(
        name="queued at decode",
        what="another request has the blocks",
        num_tokens=_LONG,
        filler_tokens=_LONG,
        is_filler_in=lambda both: both.decode.num_tickets == 1 and _arriving(both.decode) > 0,
        is_reached=lambda both: both.decode.num_waiting == 1 and both.decode.num_tickets == 1,
    ),
    Phase(
        name="asked of prefill",
        what="the order waits behind another prompt",
        num_tokens=_MEDIUM,
        filler_tokens=_MEDIUM,
        is_filler_in=lambda both: both.prefill.num_running == 1,
        is_reached=lambda both: both.decode.num_tickets == 2 and both.prefill.num_waiting == 1,
    ),
    Phase(
        name="computed by prefill",
        what="some of its chunks are done",
        num_tokens=_MEDIUM,
        is_reached=lambda both: both.prefill.num_running == 1 and _arriving(both.decode) > 0,
    ),
    Phase(
        name="KV being read",
        what="prefill is done, its blocks are leased",
        num_tokens=_SHORT,
        is_reached=lambda both: _leased(both.prefill) > 0 and _arriving(both.decode) > 0,
    ),
    Phase(
        name="decoding",
        what="prefill has forgotten it",
        num_tokens=_SHORT,
        is_reached=lambda both: both.decode.num_running == 1 and not both.prefill.num_tickets,
    ),
    Phase(
        name="finishing",
        what="the client has the last token, not the end",
        num_tokens=_SHORT,
        max_tokens=4,
        is_reached=None,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelTimes:
    """One row of the table."""

    phase: str
    is_streaming: bool
    seconds: tuple[float, ...]
    """From the close until both engines were free, in order of size."""
    num_missed: int
    """Requests that were through with the phase before it was seen; they do not count."""

    @property
    def holds(self) -> bool:
        """Whether 99 of 100 were within the limit."""
        return bool(self.seconds) and self.quantile(0.99) < LIMIT_S

    def quantile(self, share: float) -> float:
        """The smallest time that at least this share of all is not above."""
        return self.seconds[max(0, math.ceil(share * len(self.seconds)) - 1)]


class Canceller:
    """Asks and leaves. The cluster must have one prefill and one decode engine, and nobody else may use it."""

    def __init__(self, cluster: RunningCluster, watch: EngineWatch, *, seed: int = 0) -> None:
        replicas = cluster.replicas()
        roles = sorted(replica["role"] for replica in replicas)
        if roles != ["decode", "prefill"]:
            raise DrillError(f"cancel needs one prefill and one decode engine; there are {roles}")
        self._cluster = cluster
        self._watch = watch
        self._model = str(cluster.get("/v1/models")["data"][0]["id"])
        self._addresses = addresses_of(replicas)
        self._role_by_id = {str(replica["id"]): str(replica["role"]) for replica in replicas}
        self._random = random.Random(seed)

    def times(self, phase: Phase, *, is_streaming: bool, num_samples: int) -> CancelTimes:
        """Ask and leave until there are enough samples. Raises `DrillError` when the phase is hardly ever seen."""
        seconds: list[float] = []
        num_missed = 0
        while len(seconds) < num_samples:
            sample_s = self._sample(phase, is_streaming=is_streaming)
            if sample_s is not None:
                seconds.append(sample_s)
                continue
            num_missed += 1
            if num_missed > _MAX_MISSES * num_samples:
                raise DrillError(f"{phase.name}: missed {num_missed} times, seen {len(seconds)} times")
        return CancelTimes(
            phase=phase.name, is_streaming=is_streaming, seconds=tuple(sorted(seconds)), num_missed=num_missed
        )

    def _sample(self, phase: Phase, *, is_streaming: bool) -> float | None:
        """Seconds until both engines were free, or None if the phase was missed."""
        self._settle()
        with ExitStack() as clients:
            if phase.filler_tokens:
                filler = clients.enter_context(self._client())
                self._ask(filler, phase.filler_tokens, phase.max_tokens, is_streaming=True)
                if not self._reach(phase.is_filler_in):
                    return None
            client = clients.enter_context(self._client())
            self._ask(client, phase.num_tokens, phase.max_tokens, is_streaming=is_streaming)
            if phase.is_reached is None:
                _read_last_token(client, is_streaming=is_streaming)
            elif not self._reach(phase.is_reached):
                return None
            # Before the close: engines may hear of it before this thread goes on.
            left_s = time.monotonic()
        return self._settle() - left_s

    def _client(self) -> Client:
        address = urlsplit(self._cluster.url)
        return Client(address.hostname or "", address.port or 80, self._cluster.headers)

    def _ask(self, client: Client, num_tokens: int, max_tokens: int, *, is_streaming: bool) -> None:
        body = {
            "model": self._model,
            # Never twice the same: what is cached needs no transfer.
            "prompt": [self._random.randrange(1000, 30000) for _ in range(num_tokens)],
            "temperature": 0,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": is_streaming,
        }
        client.post("/v1/completions", body)

    def _both(self) -> Both:
        statuses = self._watch.statuses(self._addresses)
        by_role = {self._role_by_id[peer_id]: status for peer_id, status in statuses.items()}
        if len(by_role) != 2:
            raise DrillError(f"only {sorted(by_role)} answered")
        return Both(by_role["prefill"], by_role["decode"])

    def _polls(self, timeout_s: float) -> Iterator[Both]:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            yield self._both()
            time.sleep(0.002)

    def _reach(self, is_reached: Callable[[Both], bool]) -> bool:
        """Whether it came true, before everything was over."""
        has_begun = False
        for both in self._polls(_REACH_TIMEOUT_S):
            if is_reached(both):
                return True
            is_calm = not num_held(both.prefill) and not num_held(both.decode)
            if has_begun and is_calm:
                return False
            has_begun = has_begun or not is_calm
        return False

    def _settle(self) -> float:
        """When neither engine held anything."""
        for both in self._polls(_SETTLE_TIMEOUT_S):
            if not num_held(both.prefill) and not num_held(both.decode):
                return time.monotonic()
        raise DrillError(f"not free within {_SETTLE_TIMEOUT_S:.0f} s: {self._both()}")


class Client:
    """One HTTP connection that is closed without notice at the end of a `with` block."""

    def __init__(self, host: str, port: int, headers: Mapping[str, str]) -> None:
        """headers: of each request, besides its type."""
        self._headers = {"Content-Type": "application/json", **headers}
        self._connection = http.client.HTTPConnection(host, port, timeout=_READ_TIMEOUT_S)
        self._response: http.client.HTTPResponse | None = None

    def post(self, path: str, body: dict[str, Any]) -> None:
        """Send, and wait for nothing."""
        self._connection.request("POST", path, json.dumps(body), self._headers)

    def response(self) -> http.client.HTTPResponse:
        """Wait until the answer begins. Raises `DrillError` if it is no answer."""
        if self._response is None:
            self._response = self._connection.getresponse()
        if self._response.status != 200:
            raise DrillError(f"HTTP {self._response.status}: {self._response.read()[:300]!r}")
        return self._response

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()


def _read_last_token(client: Client, *, is_streaming: bool) -> None:
    """A whole answer begins when its last token is there; of a stream the last event with a token is read."""
    response = client.response()
    if not is_streaming:
        return
    for line in response:
        if b'"finish_reason":"length"' in line.replace(b" ", b""):
            return
    raise DrillError("the stream ended without a last token")


HEADER = f"{'cancelled while':20} {'':13} {'n':>4} {'p50':>8} {'p99':>8} {'longest':>8} {'missed':>6}"


def line_of(times: CancelTimes) -> str:
    """A row of the table."""
    return (
        f"{times.phase:20} {'streaming' if times.is_streaming else 'not streaming':13} {len(times.seconds):4d} "
        f"{times.quantile(0.5):6.3f} s {times.quantile(0.99):6.3f} s {times.seconds[-1]:6.3f} s {times.num_missed:6d}  "
        f"{'holds' if times.holds else 'BROKEN'}"
    )


def as_json(times: CancelTimes) -> dict[str, object]:
    """A row for a file."""
    return {
        "phase": times.phase,
        "streaming": times.is_streaming,
        "num_samples": len(times.seconds),
        "p50_s": times.quantile(0.5),
        "p99_s": times.quantile(0.99),
        "longest_s": times.seconds[-1],
        "num_missed": times.num_missed,
        "holds": times.holds,
    }
