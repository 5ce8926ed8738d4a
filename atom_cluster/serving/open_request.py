"""A request over all engines that work on it: what its client has already, and where it may go next. Pure; no I/O.

A request outlives its engine. What the next engine needs is the prompt, the tokens that were given out, and the
sampling parameters with their seed: from these it computes the state that the last one had. Each placement has an id
of its own, so that nothing an engine still says of an earlier one is taken for news of this.

Why an engine did not finish it decides what follows:

    lost        connection gone, engine failed, tokens lost on the way: placed again, until MAX_PLACEMENTS are lost.
                One that was only out of reach, and is back, was not lost: it was slow, or had no processor time
    not ready   draining, or failed and about to be replaced: placed again for as long as there is time
    overloaded  its queue is full: the client is told, unless the request was at an engine or waited for one before;
                then it is placed again for as long as there is time
    other       the client is told
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set

import msgspec

from atom_cluster.api.generator import GenerateInput
from atom_cluster.errors import AtomClusterError, EngineLost, NotReady, Overloaded, RequestFailed
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import EngineRequest, TokenDelta
from atom_cluster.observability.timeline import AttemptRecord
from atom_cluster.units import Deadline

MAX_PLACEMENTS = 5
"""Engines that may be lost over one request, before its first token and after: a request that takes its engines down
with it must not have all of them. How often one that is still there was out of reach does not matter."""


class OpenRequest:
    """A request that a client waits for. Memory: its output tokens."""

    def __init__(
        self,
        request: GenerateInput,
        *,
        timeout_s: float,
        avoid_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`timeout_s` is for all placements together, unless the client waits less long. An engine that failed it is
        avoided for `avoid_s`."""
        self.input = request
        longest = Deadline.after(timeout_s)
        self.deadline = longest if request.deadline is None else min(longest, request.deadline, key=lambda it: it.at_s)
        self.has_waited = False
        """Whether there was no engine for it at some time."""
        self._avoid_s = avoid_s
        self._clock = clock
        self._emitted: list[int] = []
        self._num_cached_tokens = 0
        self._has_prompt_scores = False
        self._num_placements = self._num_failed = 0
        self._out_of_reach: frozenset[PeerAddress] = frozenset()
        """Engines that were lost without a word, and have not come back."""
        self._avoided_until_s: dict[str, float] = {}
        self.attempt = AttemptRecord(clock())
        """What is noted of the current placement."""

    @property
    def num_emitted(self) -> int:
        """Output tokens that the client has."""
        return len(self._emitted)

    @property
    def known_token_ids(self) -> tuple[int, ...]:
        """Prompt and output so far: what the next engine computes first."""
        return (*self.input.token_ids, *self._emitted)

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether its prompt is to be scored, and its client has not been told."""
        return self.input.sampling.prompt_logprobs is not None and not self._has_prompt_scores

    @property
    def is_new(self) -> bool:
        """Whether no engine was asked yet."""
        return self._num_placements == 0

    def begin_attempt(self) -> None:
        """An engine is to be found for it, or another one."""
        self.attempt = self.input.record.begin_attempt()

    def avoided(self) -> set[str]:
        """Engines that failed it a moment ago."""
        now_s = self._clock()
        return {peer_id for peer_id, until_s in self._avoided_until_s.items() if until_s > now_s}

    def place(self, *, prefill: PeerAddress | None, eos_token_ids: tuple[int, ...]) -> EngineRequest:
        """The message to the next engine."""
        self._num_placements += 1
        request_id, sampling = self.input.request_id, self.input.sampling
        if not self.wants_prompt_scores:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return EngineRequest(
            request_id=request_id if self._num_placements == 1 else f"{request_id}#{self._num_placements}",
            token_ids=self.input.token_ids,
            emitted=tuple(self._emitted),
            sampling=sampling,
            eos_token_ids=eos_token_ids,
            prefill=prefill,
            deadline_s=self.deadline.remaining_s,
            priority=self.input.priority,
            client_request_id=self.input.record.client_request_id,
        )

    def take(self, delta: TokenDelta) -> TokenDelta:
        """Note the current engine's news, which continue what the client has; the delta for the client."""
        if not self._emitted:
            # Later engines find what earlier ones computed; all the same the prompt was computed for this request.
            self._num_cached_tokens = delta.num_cached_tokens
        self._emitted += delta.token_ids
        self._has_prompt_scores |= delta.prompt_logprobs is not None
        if self._num_placements == 1:
            return delta
        return msgspec.structs.replace(
            delta, request_id=self.input.request_id, num_cached_tokens=self._num_cached_tokens
        )

    def fail(self, error: AtomClusterError, engine: PeerAddress, *, present: Set[PeerAddress]) -> None:
        """The current engine did not finish it. Returns if it is to be placed again, else raises what to tell.

        `present`: engines that are there now, which this one is not if it was lost and has not come back.
        """
        avoid_s = self._avoid_s
        if isinstance(error, EngineLost):
            self._count_lost(error, engine, present)
        elif isinstance(error, Overloaded) and not isinstance(error, NotReady):
            if self._num_placements == 1 and not self.has_waited:
                raise error
            # What it says of its queue is for clients, who keep nothing waiting here.
            avoid_s = min(avoid_s, error.retry_after_s)
        elif not isinstance(error, NotReady):
            raise error
        self._avoided_until_s[engine.peer_id] = self._clock() + avoid_s

    def _count_lost(self, error: EngineLost, engine: PeerAddress, present: Set[PeerAddress]) -> None:
        if error.may_return:
            self._out_of_reach |= {engine}
        else:
            self._num_failed += 1
        self._out_of_reach -= present
        if self._num_failed + len(self._out_of_reach) >= MAX_PLACEMENTS:
            raise RequestFailed(
                f"{MAX_PLACEMENTS} engines were lost, one after the other, while they worked on the request"
            ) from error
