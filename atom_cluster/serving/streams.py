"""Stop 13 of 14: the deltas of one request between the socket and its reader. Next: api/text/text_stream.py.

A reader that is slower than the engine finds its pending deltas merged into one, so a slow client costs the ingress
less, not more. A delta that does not continue where the last one ended means that something was lost or doubled: the
stream ends there as if the engine were gone, rather than showing a text that the model did not write.
"""

from __future__ import annotations

import asyncio
import time

import msgspec

from atom_cluster.errors import AtomClusterError, EngineLost, RequestTimeout
from atom_cluster.messages.failures import error_of
from atom_cluster.messages.requests import TokenDelta
from atom_cluster.observability.timeline import AttemptRecord
from atom_cluster.units import Deadline


class DeltaStream:
    """Deltas of one request from one engine, pushed from the endpoint's callback and read by one reader on the same
    event loop."""

    def __init__(
        self, request_id: str, peer_id: str, *, num_tokens: int = 0, attempt: AttemptRecord | None = None
    ) -> None:
        """`num_tokens` output tokens came from engines before this one. `attempt`: where to note what comes when."""
        self.request_id = request_id
        self._attempt = attempt
        self.peer_id = peer_id
        """The engine that runs the request."""
        self.num_tokens = num_tokens
        """Output tokens pushed so far; the index that the next delta must start at."""
        self._pending: list[TokenDelta] = []
        self._error: AtomClusterError | None = None
        self._wake = asyncio.Event()

    def push(self, delta: TokenDelta) -> None:
        """Take the next delta."""
        if self._error is not None:
            return  # what follows a gap does not continue what is before it
        if delta.first_index != self.num_tokens and delta.error is None:
            self.fail(EngineLost(f"tokens were lost on the way: got index {delta.first_index}, not {self.num_tokens}"))
            return
        self.num_tokens += len(delta.token_ids)
        if self._attempt is not None:
            self._attempt.hear(len(delta.token_ids), delta.timing, time.monotonic())
        self._pending.append(delta)
        self._wake.set()

    def fail(self, error: AtomClusterError) -> None:
        """End the stream with an error, after what is already pending."""
        self._error = self._error or error
        self._wake.set()

    async def read(self, deadline: Deadline) -> TokenDelta:
        """Everything that has arrived, merged; waits if that is nothing. Raises what the request failed with."""
        if not self._pending:
            await self._wait(deadline)
        pending, self._pending = self._pending, []
        delta = pending[0] if len(pending) == 1 else _merge(pending)
        if delta.error is not None:
            if not delta.token_ids and delta.prompt_logprobs is None:
                raise error_of(delta.error)
            # Tokens first, the error when the reader comes back.
            self._error = error_of(delta.error)
            return msgspec.structs.replace(delta, finish_reason=None, error=None)
        return delta

    async def _wait(self, deadline: Deadline) -> None:
        # Not `asyncio.wait_for`: before Python 3.12 it forgets a cancellation that comes together with a delta, and the
        # request of a client that has left would run to its end.
        loop = asyncio.get_running_loop()
        while not self._pending:
            if self._error is not None:
                raise self._error
            if deadline.has_passed:
                raise RequestTimeout("the request did not finish in time")
            self._wake.clear()
            timer = loop.call_later(deadline.remaining_s, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()


def _merge(deltas: list[TokenDelta]) -> TokenDelta:
    last = deltas[-1]
    has_logprobs = any(delta.logprobs is not None for delta in deltas)
    return TokenDelta(
        request_id=last.request_id,
        first_index=deltas[0].first_index,
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs or ()) if has_logprobs else None,
        # Those of the engine that gave the first delta: no other is asked for them.
        prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        error=last.error,
        num_cached_tokens=max(delta.num_cached_tokens for delta in deltas),
        timing=last.timing,
    )
