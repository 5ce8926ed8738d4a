"""A small server in this process that speaks as much of the API as the load tools ask of it."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import web


class FakeServer:
    """Answers all three endpoints with two events; keeps what it was asked and how many at a time."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.posts: list[str] = []
        self.num_open = 0
        self.max_open = 0
        self.failure: str | None = None
        self.gap_s = 0.005
        self.hold_until = 0
        """Nobody gets an answer before so many have asked."""
        self.front_s = 0.0
        """What stands between this server's handlers and its clients takes so long."""
        self.server_skew_s = 0.0
        """What the server's histograms have too much."""
        self.sums = {"time_to_first_token": 0.0, "inter_token": 0.0, "time_per_output_token": 0.0}
        self.counts = dict.fromkeys(self.sums, 0)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/responses", self.responses)
        app.router.add_post("/start_profile", self.profile)
        app.router.add_post("/stop_profile", self.profile)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/cluster", self.cluster)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/health", self.health)
        return app

    async def completions(self, request: web.Request) -> web.StreamResponse:
        def event(text: str) -> dict[str, Any]:
            return {"choices": [{"index": 0, "text": text}], "usage": None}

        return await self._answer(request, [event("a"), event("b")])

    async def chat(self, request: web.Request) -> web.StreamResponse:
        def event(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
            return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "usage": None}

        role, first = event({"role": "assistant", "content": ""}), event({"reasoning_content": "a"})
        return await self._answer(request, [[role, first], [event({"content": "b"}), event({}, "length")]])

    async def responses(self, request: web.Request) -> web.StreamResponse:
        def event(text: str) -> dict[str, Any]:
            return {"type": "response.output_text.delta", "delta": text}

        return await self._answer(request, [[{"type": "response.created"}, event("a")], event("b")])

    async def _answer(self, request: web.Request, events: list[Any]) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.failure == "refused":
            return web.json_response({"error": {"message": "full"}}, status=503)
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await self._stream(response, request.path, body, events)
        finally:
            self.num_open -= 1
        return response

    async def _stream(self, response: web.StreamResponse, path: str, body: dict[str, Any], events: list[Any]) -> None:
        while self.max_open < self.hold_until:
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.front_s)
        at_s = [asyncio.get_running_loop().time()]
        for group in events:
            await asyncio.sleep(self.gap_s)
            await _send(response, *(group if isinstance(group, list) else [group]))
            at_s.append(asyncio.get_running_loop().time())
        if self.failure == "broken":
            await _send(response, {"error": {"message": "engine lost"}})
        num_output = body.get("max_tokens") or body["max_output_tokens"]
        prompt = body.get("prompt", [0] * 5)
        await self._end(response, path, len(prompt), num_output - (self.failure == "short"))
        self._observe(at_s, num_output)

    async def _end(self, response: web.StreamResponse, path: str, num_prompt: int, num_output: int) -> None:
        if self.failure == "cut":
            return
        if path == "/v1/responses":
            details = {"cached_tokens": 2}
            usage = {"input_tokens": num_prompt, "output_tokens": num_output, "input_tokens_details": details}
            await _send(response, {"type": "response.completed", "response": {"usage": usage}})
            return
        usage = {"prompt_tokens": num_prompt, "completion_tokens": num_output}
        await _send(response, {"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": 2}}})
        await response.write(b"data: [DONE]\n\n")

    def _observe(self, at_s: list[float], num_output: int) -> None:
        begun_s, first_s, last_s = at_s
        mean_s = (last_s - first_s) / max(1, num_output - 1)
        for name, total_s, num in (
            ("time_to_first_token", first_s - begun_s + self.server_skew_s, 1),
            ("inter_token", last_s - first_s, 1),
            ("time_per_output_token", mean_s, 1),
        ):
            self.sums[name] += total_s
            self.counts[name] += num

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def cluster(self, _: web.Request) -> web.Response:
        return web.json_response({"ingresses": [{"pid": os.getpid()}]})

    async def health(self, _: web.Request) -> web.Response:
        await asyncio.sleep(self.front_s)
        return web.json_response({"status": "ok"})

    async def profile(self, request: web.Request) -> web.Response:
        self.posts.append(request.path)
        return web.json_response({"files": []})

    async def metrics(self, _: web.Request) -> web.Response:
        lines = []
        for name, total in self.sums.items():
            full = f"atom_http_{name}_seconds"
            lines += [
                f"# TYPE {full} histogram",
                f'{full}_bucket{{le="+Inf",replica="r"}} {self.counts[name]}',
                f'{full}_sum{{replica="r"}} {total}',
                f'{full}_count{{replica="r"}} {self.counts[name]}',
            ]
        return web.Response(text="\n".join(lines) + "\n")


async def _send(response: web.StreamResponse, *events: object) -> None:
    await response.write(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))


@asynccontextmanager
async def running() -> AsyncIterator[FakeServer]:
    """Answers at `url` until the block ends."""
    fake = FakeServer()
    runner = web.AppRunner(fake.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()


@contextmanager
def running_in_thread() -> Iterator[FakeServer]:
    """The same for commands, which have an event loop of their own."""
    started: queue.Queue[tuple[FakeServer, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        async with running() as fake:
            end = asyncio.Event()
            started.put((fake, asyncio.get_running_loop(), end))
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    fake, loop, end = started.get(timeout=30)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(timeout=30)
