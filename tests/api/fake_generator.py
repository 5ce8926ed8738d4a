"""A `Generator` that plays scripts, and an HTTP client over an app that uses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from atom_cluster.api.generator import FoundTimeline, GenerateInput
from atom_cluster.api.operating.profile_types import ProfileRequest, ProfileTarget
from atom_cluster.errors import AtomClusterError, NotReady
from atom_cluster.messages.requests import FinishReason, PromptScore, TokenDelta, TokenLogprobs, TopLogprob

Step = tuple[int, ...] | AtomClusterError | Exception | FinishReason | asyncio.Event
"""New tokens, an error to raise, how the output finishes, or something to wait for."""
Script = Callable[[GenerateInput], Iterable[Step]]


class FakeGenerator:
    """Plays `script(request)` for each request and keeps account of what is open."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[GenerateInput] = []
        self.open_ids: set[str] = set()
        self.num_cached_tokens = 0
        self.is_ready = True
        self.found_timeline = FoundTimeline()
        self.profile_calls: list[ProfileTarget] = []
        self.profile_error: AtomClusterError | None = None
        self.all_closed = asyncio.Event()
        self._streams: list[AsyncIterator[TokenDelta]] = []

    def generate(self, request: GenerateInput) -> AsyncIterator[TokenDelta]:
        stream = self._play(request)
        # Held, so that a stream nobody closes stays open instead of being closed by the garbage collector.
        self._streams.append(stream)
        return stream

    async def _play(self, request: GenerateInput) -> AsyncIterator[TokenDelta]:
        self.requests.append(request)
        self.open_ids.add(request.request_id)
        self.all_closed.clear()
        try:
            num_tokens = 0
            prompt_scores = self._prompt_scores(request)
            for step in self.script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                    continue
                token_ids = () if isinstance(step, str) else step
                yield TokenDelta(
                    request_id=request.request_id,
                    first_index=num_tokens,
                    token_ids=token_ids,
                    logprobs=self._logprobs(request, token_ids),
                    prompt_logprobs=prompt_scores,
                    finish_reason=step if isinstance(step, str) else None,
                    num_cached_tokens=self.num_cached_tokens,
                )
                num_tokens += len(token_ids)
                prompt_scores = None
                await asyncio.sleep(0)
        finally:
            self.open_ids.remove(request.request_id)
            if not self.open_ids:
                self.all_closed.set()

    async def check_ready(self) -> None:
        if not self.is_ready:
            raise NotReady("no decode replica yet", retry_after_s=2.5)

    def cluster_state(self) -> dict[str, Any]:
        return {"replicas": [{"role": "decode"}]}

    async def metrics_text(self) -> str:
        return "atom_requests_running 0\n"

    async def find_timeline(self, request_id: str) -> FoundTimeline:
        return self.found_timeline

    async def start_profile(self, request: ProfileRequest) -> dict[str, Any]:
        return await self.stop_profile(request)

    async def stop_profile(self, target: ProfileTarget) -> dict[str, Any]:
        if self.profile_error is not None:
            raise self.profile_error
        self.profile_calls.append(target)
        return {"replicas": [{"replica": "decode-1"}]}

    def _prompt_scores(self, request: GenerateInput) -> tuple[PromptScore | None, ...] | None:
        """Each token but the first is the second most likely one, behind the one after it in the vocabulary."""
        num_top = request.sampling.prompt_logprobs
        if num_top is None:
            return None

        def score(token_id: int) -> PromptScore:
            top = (TopLogprob(token_id + 1, -0.25), TopLogprob(token_id, -1.5), TopLogprob(token_id + 2, -9.0))
            return PromptScore(-1.5, 2, top[:num_top])

        return (None, *(score(token_id) for token_id in request.token_ids[1:]))

    def _logprobs(self, request: GenerateInput, token_ids: tuple[int, ...]) -> tuple[TokenLogprobs, ...] | None:
        if request.sampling.logprobs is None:
            return None
        top = tuple(TopLogprob(token_id, -1.0 - token_id / 100) for token_id in range(request.sampling.logprobs))
        return tuple(TokenLogprobs(-token_id / 100, top) for token_id in token_ids)
