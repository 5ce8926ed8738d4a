"""An asyncio client of the OpenAI endpoints that notes when each piece of every answer arrived.

What the endpoints' words are is in `benchmarks.endpoints`, when requests are sent in `benchmarks.load`.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Mapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from benchmarks.endpoints import Endpoint, Piece

_READ_BYTES = 2**16
_ERROR_CHARS = 200


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. Times are seconds of this process's monotonic clock."""

    sent_s: float
    event_times_s: MutableSequence[float] = field(default_factory=lambda: array("d"))
    """Arrival of each streamed event with output; an event can carry several tokens."""
    ended_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None
    due_s: float | None = None
    """When it was to be sent; None: as soon as others had ended."""
    num_wanted_tokens: int | None = None
    """Output tokens that have to come, when the request ignores the end token."""
    text: str | None = None
    """What was generated, if it was to be kept."""

    @property
    def error_kind(self) -> str | None:
        """The error without what differs from one request to the next: `HTTP 503`, `TimeoutError`."""
        return None if self.error is None else self.error.partition(":")[0]

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first output; None: there was none."""
        return self.event_times_s[0] - self.sent_s if self.event_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token behind the first; None: there is none behind it."""
        if self.num_output_tokens < 2 or not self.event_times_s:
            return None
        return (self.event_times_s[-1] - self.event_times_s[0]) / (self.num_output_tokens - 1)

    @property
    def e2el_s(self) -> float | None:
        """From sending to the last output; None: there was none."""
        return self.event_times_s[-1] - self.sent_s if self.event_times_s else None

    @property
    def is_incomplete(self) -> bool:
        """Whether tokens are missing, told or not."""
        wanted = self.num_wanted_tokens
        return self.error is not None or (wanted is not None and self.num_output_tokens < wanted)


class ApiClient:
    """Streams answers of one endpoint of one server. `close` it."""

    def __init__(
        self,
        base_url: str,
        endpoint: Endpoint,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        max_connections: int = 0,
        keep_text: bool = False,
    ) -> None:
        """To be called inside a running event loop. max_connections: 0 sets no limit."""
        self._base_url = base_url.rstrip("/")
        self._endpoint = endpoint
        self._keep_text = keep_text
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=max_connections, force_close=False),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            headers={"Content-Type": "application/json", **(headers or {})},
            read_bufsize=_READ_BYTES,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def get_json(self, path: str) -> Any:
        """Body of a GET. Raises `aiohttp.ClientError` on anything but 200."""
        async with self._session.get(self._base_url + path) as response:
            response.raise_for_status()
            return await response.json()

    async def get_text(self, path: str) -> str:
        """Body of a GET. Raises `aiohttp.ClientError` on anything but 200."""
        async with self._session.get(self._base_url + path) as response:
            response.raise_for_status()
            return await response.text()

    async def post(self, path: str, body: Mapping[str, Any]) -> str:
        """Body of the answer to a POST of JSON. Raises `aiohttp.ClientError` on anything but 200."""
        async with self._session.post(self._base_url + path, data=msgspec.json.encode(body)) as response:
            response.raise_for_status()
            return await response.text()

    async def send(self, body: bytes) -> RequestRecord:
        """Ask for a streamed answer and read it. Failures are recorded, not raised."""
        record = RequestRecord(sent_s=time.monotonic(), text="" if self._keep_text else None)
        try:
            async with self._session.post(self._base_url + self._endpoint.path, data=body) as response:
                if response.status == 200:
                    await self._read_stream(response, record)
                else:
                    record.error = f"HTTP {response.status}: {(await response.text())[:_ERROR_CHARS]}"
        except (aiohttp.ClientError, asyncio.TimeoutError, msgspec.DecodeError, OSError) as exc:
            record.error = f"{type(exc).__name__}: {exc}"[:_ERROR_CHARS]
        record.ended_s = time.monotonic()
        return record

    async def _read_stream(self, response: aiohttp.ClientResponse, record: RequestRecord) -> None:
        """Events are parsed by hand: a reader that awaits every line costs most of this process's time."""
        rest = b""
        is_whole = False
        texts: list[str] = []
        while chunk := await response.content.readany():
            now_s = time.monotonic()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                piece = self._endpoint.piece(line[5:].strip())
                is_whole = is_whole or piece.is_last
                _note(record, piece, now_s)
                if self._keep_text and piece.text:
                    texts.append(piece.text)
        if self._keep_text:
            record.text = "".join(texts)
        if not is_whole and record.error is None:
            record.error = "the stream ended early: its last event is missing"


def _note(record: RequestRecord, piece: Piece, now_s: float) -> None:
    times = record.event_times_s
    if piece.has_output or (piece.is_finish and (not times or times[-1] < now_s)):
        # The token that ends an answer may have no text: then only the reason tells that it came.
        times.append(now_s)
    if piece.error is not None:
        record.error = f"error in stream: {piece.error[:_ERROR_CHARS]}"
    if piece.usage is not None:
        record.num_prompt_tokens, record.num_output_tokens, record.num_cached_tokens = piece.usage
