"""Hundreds of connections at once, against queues that are short: who is refused, and how soon are the others served?

Every connection must end in one of two ways: a whole answer, or 503 (429 where there are rate limits) with Retry-After.
Then a client asks that comes back as often as it is told to, and must be served: others fill the queues as well, so its
first try may be refused. Only a cluster on this host is flooded.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from atom_cluster.tools.drill.cluster import DrillError, RunningCluster

NUM_CONNECTIONS = 500
NEEDS = {"scheduler": {"max_waiting_requests": 64, "max_num_requests": 16}}
"""Engines with short queues: most of a flood finds them full."""
_NUM_TOKENS = 24
_TIMEOUT_S = 240.0
"""A connection that has not ended by then is an error."""
_MAX_HEAD_BYTES = 1 << 16
_REFUSALS = (429, 503)


@dataclass(frozen=True, slots=True)
class Ending:
    """How one connection of a flood ended. Times are seconds since it was opened."""

    status: int
    head_s: float
    """Until the answer began."""
    end_s: float
    retry_after_s: int | None
    is_whole: bool
    """Whether the stream ended as it should."""


def flood(cluster: RunningCluster, *, num_connections: int = NUM_CONNECTIONS) -> dict[str, float]:
    """Flood a cluster; what came of it. Raises `DrillError` for an ending that is neither an answer nor a refusal."""
    host, port = _loopback(cluster.url)
    model = str(cluster.get("/v1/models")["data"][0]["id"])
    headers = "".join(f"{name}: {value}\r\n" for name, value in cluster.headers.items())

    def ask(number: int) -> list[Ending]:
        return asyncio.run(_flood(host, port, model, number, headers))

    def patient() -> tuple[Ending, ...]:
        return until_served(lambda: ask(1)[0])

    before, endings, after = patient(), ask(num_connections), patient()
    check(endings)
    return (
        summary(endings)
        | {"one_before_s": _total_s(before), "one_before_refused": len(before) - 1}
        | {"one_after_s": _total_s(after), "one_after_refused": len(after) - 1}
    )


def until_served(
    ask: Callable[[], Ending], *, timeout_s: float = _TIMEOUT_S, sleep: Callable[[float], None] = time.sleep
) -> tuple[Ending, ...]:
    """Ask, and again when told to, until served; how each try ended, the last of them served.

    Raises `DrillError` for an ending that is neither an answer nor a refusal, and if tries and the waits that refusals
    ask for come to more than `timeout_s`.
    """
    endings = [ask()]
    check(endings)
    while endings[-1].status != 200:
        wait_s = endings[-1].retry_after_s or 0
        if _total_s(endings) + wait_s > timeout_s:
            raise DrillError(f"refused {len(endings)} times, and told to come back after more than {timeout_s:.0f} s")
        sleep(wait_s)
        endings.append(ask())
        check(endings[-1:])
    return tuple(endings)


def _total_s(endings: Sequence[Ending]) -> float:
    """Seconds that tries one after the other took, with the waits that each refusal asked for."""
    return round(sum(ending.end_s for ending in endings) + sum(ending.retry_after_s or 0 for ending in endings[:-1]), 3)


def check(endings: Sequence[Ending]) -> None:
    """Raise `DrillError` unless each connection was served, or refused with the time to come back."""
    for ending in endings:
        is_served = ending.status == 200 and ending.is_whole
        is_refused = ending.status in _REFUSALS and (ending.retry_after_s or 0) >= 1
        if not (is_served or is_refused):
            raise DrillError(f"a connection ended otherwise than served or refused: {ending}")


def summary(endings: Sequence[Ending]) -> dict[str, float]:
    """Numbers and times, of those served and of those refused."""
    served = [ending for ending in endings if ending.status == 200]
    refused = [ending for ending in endings if ending.status != 200]
    found: dict[str, float] = {"connections": len(endings), "served": len(served), "refused": len(refused)}
    for name, values in (
        ("served_begin", [ending.head_s for ending in served]),
        ("served_end", [ending.end_s for ending in served]),
        ("refused_end", [ending.end_s for ending in refused]),
    ):
        if values:
            ordered = sorted(values)
            found[f"{name}_p50_s"] = round(ordered[len(ordered) // 2], 3)
            found[f"{name}_max_s"] = round(ordered[-1], 3)
    return found


async def _flood(host: str, port: int, model: str, num_connections: int, headers: str) -> list[Ending]:
    async def one(number: int) -> Ending:
        body: dict[str, Any] = {
            "model": model,
            "prompt": f"Count from {number} to {number + 100}:",
            "max_tokens": _NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            return await asyncio.wait_for(_ask(host, port, json.dumps(body).encode(), headers), _TIMEOUT_S)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, asyncio.LimitOverrunError) as exc:
            raise DrillError(f"a connection of the flood had no answer: {exc!r}") from exc

    return await asyncio.gather(*(one(number) for number in range(num_connections)))


async def _ask(host: str, port: int, body: bytes, headers: str) -> Ending:
    began_s = time.monotonic()
    reader, writer = await asyncio.open_connection(host, port, limit=_MAX_HEAD_BYTES)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        head_s = time.monotonic() - began_s
        text = await reader.read(-1)
        retry_after = re.search(r"^retry-after: (\d+)\r$", answer, re.IGNORECASE | re.MULTILINE)
        return Ending(
            status=int(answer.split(" ", 2)[1]),
            head_s=head_s,
            end_s=time.monotonic() - began_s,
            retry_after_s=None if retry_after is None else int(retry_after[1]),
            is_whole=b"data: [DONE]" in text,
        )
    finally:
        writer.close()


def _loopback(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise DrillError(f"{host} is not this host: only that is flooded")
    return host, port
