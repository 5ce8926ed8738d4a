"""An asyncio client of the OpenAI completions API that notes when each piece of every answer arrived."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. Times are seconds of this process's monotonic clock."""

    sent_s: float
    event_times_s: list[float] = field(default_factory=list)
    """Arrival of each streamed event with output; an event can carry several tokens."""
    ended_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Error(msgspec.Struct):
    message: str = ""


class _Event(msgspec.Struct):
    """The parts of a streamed event that are looked at."""

    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    error: _Error | None = None


_decoder = msgspec.json.Decoder(_Event)


class CompletionsClient:
    """Sends prompts of token ids to `/v1/completions` of one server, streaming. `close` it."""

    def __init__(self, base_url: str, *, timeout_s: float) -> None:
        """To be called inside a running event loop."""
        self._base_url = base_url.rstrip("/")
        self.model = ""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            read_bufsize=2**20,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def get_json(self, path: str) -> Any:
        """Body of a GET. Raises `aiohttp.ClientError` on anything but 200."""
        async with self._session.get(self._base_url + path) as response:
            response.raise_for_status()
            return await response.json()

    async def complete(self, prompt: Sequence[int], output_len: int) -> RequestRecord:
        """Ask for exactly `output_len` tokens. Failures are recorded, not raised."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_len,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        record = RequestRecord(sent_s=time.monotonic())
        try:
            async with self._session.post(f"{self._base_url}/v1/completions", json=body) as response:
                if response.status == 200:
                    await _read_stream(response, record)
                else:
                    record.error = f"HTTP {response.status}: {(await response.text())[:200]}"
        except (aiohttp.ClientError, asyncio.TimeoutError, msgspec.DecodeError) as exc:
            record.error = f"{type(exc).__name__}: {exc}"
        record.ended_s = time.monotonic()
        return record


async def _read_stream(response: aiohttp.ClientResponse, record: RequestRecord) -> None:
    is_done = False
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            is_done = True
            continue
        event = _decoder.decode(data)
        if event.error is not None:
            record.error = f"error in stream: {event.error.message[:200]}"
        if event.choices:
            record.event_times_s.append(time.monotonic())
        if event.usage is not None:
            record.num_prompt_tokens = event.usage.prompt_tokens
            record.num_output_tokens = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            record.num_cached_tokens = 0 if details is None else details.cached_tokens
    if not is_done and record.error is None:
        record.error = "the stream ended without [DONE]"


async def closed_loop(
    client: CompletionsClient, prompts: Sequence[Sequence[int]], output_len: int, concurrency: int
) -> list[RequestRecord]:
    """`concurrency` users, each sending its next request when its last one has ended."""
    remaining = iter(prompts)

    async def user() -> list[RequestRecord]:
        return [await client.complete(prompt, output_len) for prompt in remaining]

    return [record for records in await asyncio.gather(*(user() for _ in range(concurrency))) for record in records]


async def open_loop(
    client: CompletionsClient, prompts: Sequence[Sequence[int]], output_len: int, arrivals_s: Iterator[float]
) -> list[RequestRecord]:
    """Requests are sent at their times whether or not earlier ones have ended."""
    start_s = time.monotonic()
    tasks = []
    for prompt, at_s in zip(prompts, arrivals_s):
        await asyncio.sleep(max(0.0, start_s + at_s - time.monotonic()))
        tasks.append(asyncio.create_task(client.complete(prompt, output_len)))
    return list(await asyncio.gather(*tasks))
