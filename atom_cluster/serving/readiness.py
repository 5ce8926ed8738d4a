"""Ready means that a real generation went through: over the router, prefill, the KV transfer and decode, and back."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from atom_cluster.api.generator import GenerateInput
from atom_cluster.errors import AtomClusterError, NotReady
from atom_cluster.messages.requests import SamplingParams, TokenDelta

VALID_S = 10.0
"""A generation that succeeded this recently counts."""
TIMEOUT_S = 30.0
_PROMPT_TOKENS = 64
"""Long enough to be worth a prefill replica under any usual setting."""
_OUTPUT_TOKENS = 2
"""The first comes from prefill, the second needs decode to have its KV."""


class _Streams(Protocol):
    def generate(self, request: GenerateInput) -> AsyncGenerator[TokenDelta, None]: ...


class ReadinessProbe:
    """Runs one short generation at a time, however many ask; all who ask meanwhile get its outcome."""

    def __init__(self, streams: _Streams, *, num_vocab_tokens: int, max_model_len: int) -> None:
        """`num_vocab_tokens`: prompts use token ids below it. `max_model_len`: tokens of prompt plus output."""
        self._streams = streams
        self._num_vocab_tokens = num_vocab_tokens
        self._num_prompt_tokens = min(_PROMPT_TOKENS, max_model_len - _OUTPUT_TOKENS)
        self._succeeded_at_s = -VALID_S
        self._attempt: asyncio.Task[None] | None = None
        self._numbers = itertools.count()

    async def check(self) -> None:
        """Return when a generation went through in the last `VALID_S` seconds or goes through now; else `NotReady`."""
        if time.monotonic() - self._succeeded_at_s < VALID_S:
            return
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.create_task(self._try())
        # Each waiter has its own attempt otherwise, and probes of a cluster that hangs pile up faster than they end.
        await asyncio.shield(self._attempt)

    async def _try(self) -> None:
        try:
            await asyncio.wait_for(self._generate(), TIMEOUT_S)
        except asyncio.TimeoutError:
            raise NotReady(f"a test generation took longer than {TIMEOUT_S} s", retry_after_s=2.0) from None
        except AtomClusterError as exc:
            raise NotReady(f"a test generation failed: {exc}", retry_after_s=2.0) from exc
        self._succeeded_at_s = time.monotonic()

    async def _generate(self) -> None:
        number = next(self._numbers)
        # Another prompt each time: one found in a prefix cache would prove less.
        token_ids = tuple(
            (number * 7919 + position * 31) % self._num_vocab_tokens for position in range(self._num_prompt_tokens)
        )
        request = GenerateInput(
            request_id=f"ready-{time.time_ns()}-{number}",
            token_ids=token_ids,
            sampling=SamplingParams(temperature=0.0, max_tokens=_OUTPUT_TOKENS, ignore_eos=True, seed=0),
        )
        async with aclosing(self._streams.generate(request)) as deltas:
            async for _ in deltas:
                pass
