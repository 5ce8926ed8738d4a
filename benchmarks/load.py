"""Sends a workload: when each request goes out, how many are under way, and whether this process keeps up.

Requests are made and encoded in a thread, a few ahead of the clock, so neither their text nor their bytes are ever all
in memory. Knows nothing of endpoints or of what is measured.
"""

from __future__ import annotations

import asyncio
import resource
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from benchmarks.client import RequestRecord
from benchmarks.datasets.request import LoadRequest

_SPARE_FILES = 64
_AHEAD = 64
"""Requests that are made before they are due."""
_BATCH = 8
_BEAT_S = 0.02
_START_DELAY_S = 0.05
LAG_LIMIT_MS = 10.0
"""Above this at the 99th percentile, latencies of single events are the client's as much as the server's."""
CPU_LIMIT = 0.9


@dataclass(frozen=True, slots=True)
class Order:
    """One request, ready to go out."""

    body: bytes
    due_s: float | None
    """After the start; None: as soon as there is room."""
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLoad:
    """How busy the client was."""

    event_loop_lag_ms_mean: float
    event_loop_lag_ms_p99: float
    event_loop_lag_ms_max: float
    """How much later than asked a timer of this process went off."""
    cpu_share: float
    """Of one core."""
    late_ms_p99: float
    """How much after their times requests were sent."""
    max_under_way: int

    @property
    def is_bottleneck(self) -> bool:
        """Whether this process was too busy for what it measured."""
        return self.event_loop_lag_ms_p99 > LAG_LIMIT_MS or self.cpu_share > CPU_LIMIT


@dataclass(frozen=True, slots=True)
class Sent:
    """A load that was sent."""

    records: list[RequestRecord]
    """In the order of sending."""
    begun_s: float
    ended_s: float
    client: ClientLoad


def file_limit() -> int:
    """Connections that this process may have at a time, after raising the limit of open files as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return (2**16 if hard == resource.RLIM_INFINITY else hard) - _SPARE_FILES


async def send_all(
    orders: Iterator[Order],
    send: Callable[[bytes], Awaitable[RequestRecord]],
    *,
    max_under_way: int,
    on_end: Callable[[RequestRecord], None] | None = None,
) -> Sent:
    """Send each at its time, or when one of `max_under_way` has ended; all have ended when this returns.

    Requests that are due in the same moment go out in their order.
    """
    slots = asyncio.Semaphore(max_under_way)
    records: list[RequestRecord] = []
    tasks: set[asyncio.Task[None]] = set()
    under_way = most = 0

    async def one(order: Order, due_s: float | None, index: int) -> None:
        nonlocal under_way
        try:
            record = await send(order.body)
        finally:
            under_way -= 1
            slots.release()
        record.due_s = due_s
        record.num_wanted_tokens = order.output_len
        records[index] = record
        if on_end is not None:
            on_end(record)

    meter = _Meter()
    begun_s: float | None = None
    async with meter:
        async for order in _made_ahead(orders):
            if begun_s is None:
                begun_s = time.monotonic() + _START_DELAY_S
            due_s = None if order.due_s is None else begun_s + order.due_s
            await asyncio.sleep(max(0.0, (due_s or begun_s) - time.monotonic()))
            await slots.acquire()
            records.append(RequestRecord(sent_s=begun_s, error="unsent"))
            task = asyncio.create_task(one(order, due_s, len(records) - 1))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            under_way += 1
            most = max(most, under_way)
        await asyncio.gather(*tasks)
    started_s = min((record.sent_s for record in records), default=time.monotonic())
    return Sent(records, started_s, time.monotonic(), meter.load(records, most))


async def _made_ahead(orders: Iterator[Order]) -> AsyncIterator[Order]:
    """Orders, made in a thread up to `_AHEAD` before they are asked for. The first is given when those are there."""
    queue: asyncio.Queue[Order | BaseException | None] = asyncio.Queue(_AHEAD)
    loop = asyncio.get_running_loop()

    async def fill(pool: ThreadPoolExecutor) -> None:
        try:
            while batch := await loop.run_in_executor(pool, lambda: list(islice(orders, _BATCH))):
                for order in batch:
                    await queue.put(order)
            await queue.put(None)
        except Exception as exc:  # noqa: BLE001 - raised where orders are asked for
            await queue.put(exc)

    with ThreadPoolExecutor(1, thread_name_prefix="make-requests") as pool:
        filler = asyncio.create_task(fill(pool))
        try:
            while not queue.full() and not filler.done():
                await asyncio.sleep(_BEAT_S / 10)
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            filler.cancel()


class _Meter:
    """How late timers go off, and what CPU time this process uses, while the block runs."""

    def __init__(self) -> None:
        self._lags_s = array("d")
        self._task: asyncio.Task[None] | None = None
        self._begun_s = self._begun_cpu_s = self._used_s = self._used_cpu_s = 0.0

    async def __aenter__(self) -> _Meter:
        self._begun_s, self._begun_cpu_s = time.monotonic(), time.process_time()
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._used_s = time.monotonic() - self._begun_s
        self._used_cpu_s = time.process_time() - self._begun_cpu_s
        if self._task is not None:
            self._task.cancel()

    async def _beat(self) -> None:
        while True:
            wanted_s = time.monotonic() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            self._lags_s.append(time.monotonic() - wanted_s)

    def load(self, records: list[RequestRecord], max_under_way: int) -> ClientLoad:
        """What was seen, once the block has ended."""
        lags_ms = 1e3 * np.asarray(self._lags_s if len(self._lags_s) else [0.0])
        late_ms = [1e3 * max(0.0, r.sent_s - r.due_s) for r in records if r.due_s is not None] or [0.0]
        return ClientLoad(
            event_loop_lag_ms_mean=float(lags_ms.mean()),
            event_loop_lag_ms_p99=float(np.percentile(lags_ms, 99)),
            event_loop_lag_ms_max=float(lags_ms.max()),
            cpu_share=self._used_cpu_s / max(1e-9, self._used_s),
            late_ms_p99=float(np.percentile(late_ms, 99)),
            max_under_way=max_under_way,
        )


def orders_of(
    requests: Iterator[LoadRequest], encode: Callable[[LoadRequest], bytes], arrivals: Iterator[float] | None
) -> Iterator[Order]:
    """Requests as bytes, due at these times; None: at their own, if they have any."""
    for request in requests:
        due_s = next(arrivals) if arrivals is not None else request.due_s
        yield Order(encode(request), due_s, request.output_len)
