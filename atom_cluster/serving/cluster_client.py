"""Stop 4 of 14: a tokenized request leaves the ingress for the engine that the router names. Next: serving/router.py.

The ingress's side of the data plane, and the way back: token batches are split by request id and handed to whoever
iterates (stop 13). Requests never wait for the router longer than `routing.query_timeout_s`. A request whose engine is
lost goes on with another, and while there is none it waits, until its deadline (`open_request`). Knows nothing of HTTP,
text or templates.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Set
from random import Random
from typing import Any

from atom_cluster.api.generator import FoundTimeline, GenerateInput
from atom_cluster.api.operating.profile_types import ProfileRequest, ProfileTarget
from atom_cluster.api.text.model_files import ServedModel
from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.errors import AtomClusterError, EngineLost, NotReady, Overloaded, RequestTimeout
from atom_cluster.kv_cache.prefix_hash import hash_blocks, seed_of
from atom_cluster.link.codec import Message
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import MemberCard, Membership, PeerAddress, RequestDone, RouteDecision, RouteQuery
from atom_cluster.messages.profile import ProfileAnswer
from atom_cluster.messages.requests import CancelRequest, TokenBatch, TokenDelta
from atom_cluster.messages.timing import TimelineAnswer, TimelineQuery
from atom_cluster.observability.logging import FieldLogger, get_logger
from atom_cluster.observability.metrics import REQUESTS_REPLAYED, ROUTER_DECISIONS, ROUTER_QUERY_S, MetricSink
from atom_cluster.observability.timeline_store import TimelineStore
from atom_cluster.routing.fallback import FallbackPlacer
from atom_cluster.serving.cluster_page import cluster_page, scrape_metrics
from atom_cluster.serving.open_request import OpenRequest
from atom_cluster.serving.profile_calls import ProfileCalls
from atom_cluster.serving.readiness import ReadinessProbe
from atom_cluster.serving.streams import DeltaStream
from atom_cluster.serving.timeline_calls import TimelineCalls
from atom_cluster.units import Deadline

logger = get_logger(__name__)

HASH_OFF_LOOP_TOKENS = 4096
"""Prompts longer than this are hashed in a thread."""
MAX_HASHED_KINDS = 4
"""Of engines: fingerprint and block size. Two versions, each with blocks of two sizes."""
_GRACE_S = 5.0
"""The engine enforces a request's deadline; the ingress gives up this much later in case the engine does not."""
_LOOK_AGAIN_S = 0.5
"""How often a request that waits for an engine looks for one, besides whenever one joins."""


class ClusterClient:
    """Sends requests to engines and streams their tokens back. Used from one event loop."""

    def __init__(
        self,
        *,
        config: ClusterConfig,
        reasons: dict[str, str],
        model: ServedModel,
        metrics: MetricSink,
        has_had_engines: bool = False,
        timelines: TimelineStore | None = None,
    ) -> None:
        """`reasons` says why automatic choices of `config` are what they are; it is only shown. `has_had_engines`: the
        cluster was there before this client, so that requests wait for engines though it has never seen any.
        `timelines`: where other ingresses may look up requests of this one."""
        self._config = config
        self._reasons = reasons
        self._model = model
        self._metrics = metrics
        self._endpoint: Endpoint | None = None
        self._membership: Membership | None = None
        self._router: PeerAddress | None = None
        self._router_since_s = 0.0
        self._engines: dict[str, MemberCard] = {}
        self._lost: dict[str, tuple[int, float]] = {}
        """Engines lost a moment ago: epoch, and until when the router's word that they are there does not count."""
        self.has_had_engines = has_had_engines
        """Whether there ever was an engine that may take requests."""
        self._waiters: set[asyncio.Future[None]] = set()
        self._num_new_waiting = 0
        self._streams: dict[str, DeltaStream] = {}
        self._requests_by_peer: dict[str, set[str]] = {}
        self._queries: dict[int, asyncio.Future[RouteDecision]] = {}
        self._num_queries = 0
        self._prefill_may_decode = config.router.prefill_may_decode
        self._fallback = FallbackPlacer(Random(), prefill_may_decode=self._prefill_may_decode)
        self._profiles = ProfileCalls()
        self._timelines = TimelineCalls(timelines or TimelineStore(0))
        self._readiness = ReadinessProbe(self, num_vocab_tokens=model.vocab_size, max_model_len=model.max_model_len)

    # --- membership and messages, called by the ingress deployment

    def attach(self, endpoint: Endpoint) -> None:
        """Use this endpoint, whose callbacks are `receive` and `lose`."""
        self._endpoint = endpoint

    @property
    def has_open_requests(self) -> bool:
        """Whether any request is under way or waits for an engine."""
        return bool(self._streams or self._waiters)

    def update(self, membership: Membership) -> None:
        """Take the router's latest view. Engines that left it keep their requests until their connection ends."""
        endpoint = self._attached()
        now_s = time.monotonic()
        if self._membership is None or self._membership.router != membership.router:
            self._router_since_s = now_s
        self._membership = membership
        self._router = membership.router
        engines = {card.address.peer_id: card for card in membership.members if card.kind == "engine"}
        # A router that has just started has not heard from everybody yet; who is still connected here is still there.
        is_new = now_s - self._router_since_s < self._config.serving.member_timeout_s
        engines = {**self._engines, **engines} if is_new else engines
        self._lost = {peer_id: (epoch, until_s) for peer_id, (epoch, until_s) in self._lost.items() if until_s > now_s}
        self._engines = {
            peer_id: card
            for peer_id, card in engines.items()
            if peer_id not in self._lost or self._lost[peer_id][0] != card.address.epoch
        }
        endpoint.connect(membership.router)
        for card in self._engines.values():
            if self._may_decode(card):
                endpoint.connect(card.address)
                self.has_had_engines = True
        for waiter in self._waiters:
            _wake(waiter)

    def receive(self, source: str, message: Message) -> None:
        """Take a message from the endpoint."""
        if isinstance(message, TokenBatch):
            for delta in message.deltas:
                stream = self._streams.get(delta.request_id)
                if stream is not None and stream.peer_id == source:
                    stream.push(delta)
                elif delta.finish_reason is None:
                    # Given up or placed elsewhere, by an ingress that the engine seemed lost to: nobody reads it.
                    self._attached().send(source, CancelRequest(delta.request_id))
        elif isinstance(message, RouteDecision):
            query = self._queries.get(message.query_id)
            if query is not None and not query.done():
                query.set_result(message)
        elif isinstance(message, ProfileAnswer):
            self._profiles.receive(source, message)
        elif isinstance(message, TimelineQuery):
            self._attached().send(source, self._timelines.answer(message))
        elif isinstance(message, TimelineAnswer):
            self._timelines.receive(source, message)
        else:
            self._attached().note_unexpected(source, message)

    def lose(self, peer_id: str) -> None:
        """A peer is gone: its requests are placed again by their readers."""
        card = self._engines.pop(peer_id, None)
        if card is not None:
            # It may stand in the router's list for a while yet.
            self._lost[peer_id] = (card.address.epoch, time.monotonic() + self._config.serving.member_timeout_s)
        self._profiles.lose(peer_id)
        if self._router is not None and self._router.peer_id == peer_id:
            self._router = None
        for request_id in self._requests_by_peer.pop(peer_id, set()):
            self._streams[request_id].fail(EngineLost(f"the engine {peer_id} was lost", may_return=True))

    # --- requests, called by the API

    async def generate(self, request: GenerateInput) -> AsyncGenerator[TokenDelta, None]:
        """See `api.generator.Generator`."""
        serving = self._config.serving
        opened = OpenRequest(request, timeout_s=serving.request_timeout_s, avoid_s=serving.member_timeout_s)
        while True:
            opened.begin_attempt()
            decision, engine = await self._place(opened)
            stream = self._open(opened, decision, engine)
            is_over = False
            try:
                while not is_over:
                    delta = await stream.read(Deadline.after(opened.deadline.remaining_s + _GRACE_S))
                    is_over = delta.finish_reason is not None
                    yield opened.take(delta)
                return
            except AtomClusterError as exc:
                opened.attempt.error = type(exc).__name__
                if not isinstance(exc, EngineLost | Overloaded):
                    raise
                # A lost engine may turn out to be there after all, and is to know that nobody reads what it says.
                is_over = isinstance(exc, Overloaded)
                opened.fail(exc, engine, present={card.address for card in self._engines.values()})
                self._metrics.inc(REQUESTS_REPLAYED)
                _log_of(opened).info("%s goes on behind %d tokens: %s", stream.request_id, opened.num_emitted, exc)
            finally:
                opened.attempt.ended_s = time.monotonic()
                self._close(stream, decision, is_finished=is_over)

    async def check_ready(self) -> None:
        """See `api.generator.Generator`."""
        if not self._has_candidate(frozenset()):
            raise NotReady("no replica that decodes is known", retry_after_s=2.0)
        await self._readiness.check()

    def cluster_state(self) -> dict[str, Any]:
        """See `api.generator.Generator`."""
        return cluster_page(self._config, self._reasons, self._membership)

    async def metrics_text(self) -> str:
        """See `api.generator.Generator`."""
        return await scrape_metrics()

    async def find_timeline(self, request_id: str) -> FoundTimeline:
        """See `api.generator.Generator`."""
        members = () if self._membership is None else self._membership.members
        return await self._timelines.ask(self._attached(), members, request_id)

    async def start_profile(self, request: ProfileRequest) -> dict[str, Any]:
        """See `api.generator.Generator`."""
        return await self._profiles.start(self._attached(), self._engines.values(), request)

    async def stop_profile(self, target: ProfileTarget) -> dict[str, Any]:
        """See `api.generator.Generator`."""
        return await self._profiles.stop(self._attached(), self._engines.values(), target)

    async def _place(self, opened: OpenRequest) -> tuple[RouteDecision, PeerAddress]:
        """A decision that names an engine, and that engine, once there is one. Raises `NotReady` if the request may not
        wait for that, `RequestTimeout` at its deadline."""
        is_counted = False
        try:
            while True:
                excluded = opened.avoided() | (self._lost.keys() - self._engines.keys())
                if self._has_candidate(excluded):
                    decision = await self._decide(opened, excluded)
                    if decision.decode is not None:
                        return decision, decision.decode
                if opened.is_new and not is_counted:
                    self._check_may_wait()
                    self._num_new_waiting += 1
                    is_counted = True
                opened.has_waited = True
                try:
                    await self._wait_for_engines(opened.deadline)
                finally:
                    opened.attempt.note("wait_for_engine", time.monotonic())
        except AtomClusterError as exc:
            opened.attempt.error = type(exc).__name__
            raise
        finally:
            self._num_new_waiting -= is_counted

    def _has_candidate(self, excluded: Set[str]) -> bool:
        """Whether some engine could take a request now, as far as is known here."""
        return any(
            self._may_decode(card) and not card.is_draining and peer_id not in excluded
            for peer_id, card in self._engines.items()
        )

    def _may_decode(self, card: MemberCard) -> bool:
        return self._prefill_may_decode or card.role != "prefill"

    def _check_may_wait(self) -> None:
        """A new request may wait while engines are replaced, but not for a cluster that never was there, nor in any
        number. Requests that engines had are not limited: those engines' queues were."""
        limit = self._config.scheduler.max_waiting_requests
        if not self.has_had_engines:
            raise NotReady("no replica can take the request: none has joined yet", retry_after_s=2.0)
        if self._num_new_waiting >= limit:
            raise NotReady(f"no replica can take the request, and {limit} wait for one already", retry_after_s=2.0)

    async def _wait_for_engines(self, deadline: Deadline) -> None:
        if deadline.has_passed:
            raise RequestTimeout("no replica could take the request before its deadline")
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(min(_LOOK_AGAIN_S, deadline.remaining_s), _wake, waiter)
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiters.discard(waiter)

    async def _decide(self, opened: OpenRequest, excluded: Set[str]) -> RouteDecision:
        """Ask the router, or place by load alone when it is away."""
        token_ids = opened.known_token_ids
        self._num_queries += 1
        query = RouteQuery(
            query_id=self._num_queries,
            block_hashes=await self._hash_reusable(opened),
            num_tokens=len(token_ids),
            expected_output_tokens=max(0, (opened.input.sampling.max_tokens or 0) - opened.num_emitted),
            excluded=tuple(sorted(excluded)),
            client_request_id=opened.input.record.client_request_id,
        )
        decision = await self._ask_router(query)
        if decision is None or decision.decode is None:
            # Away, or too new to know anybody.
            decision = self._fallback.decide(query, self._engines.values())
            self._metrics.inc(ROUTER_DECISIONS, reason=decision.reason)
        return decision

    async def _hash_reusable(self, opened: OpenRequest) -> tuple[tuple[int, ...], ...]:
        """Hashes of the blocks that an engine may have; none of a prompt that is to be scored, which reuses nothing."""
        if opened.wants_prompt_scores:
            return ()
        return await self._hash_prompt(opened.known_token_ids)

    async def _hash_prompt(self, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """As `RouteQuery.block_hashes`. Kinds beyond the first few are placed by load alone."""
        kinds = sorted({(card.fingerprint, card.block_size) for card in self._engines.values()})[:MAX_HASHED_KINDS]

        def hash_all() -> tuple[tuple[int, ...], ...]:
            return tuple(hash_blocks(token_ids, size, seed_of(fingerprint)) for fingerprint, size in kinds)

        is_long = len(token_ids) * len(kinds) > HASH_OFF_LOOP_TOKENS
        return await asyncio.to_thread(hash_all) if is_long else hash_all()

    async def _ask_router(self, query: RouteQuery) -> RouteDecision | None:
        endpoint = self._attached()
        if self._router is None:
            return None
        answer: asyncio.Future[RouteDecision] = asyncio.get_running_loop().create_future()
        self._queries[query.query_id] = answer
        began_s = time.monotonic()
        try:
            if not endpoint.send(self._router, query):
                return None
            # Not `wait_for`, which may forget a cancellation; see `DeltaStream`.
            await asyncio.wait((answer,), timeout=self._config.router.query_timeout_s)
            return answer.result() if answer.done() else None
        finally:
            del self._queries[query.query_id]
            self._metrics.observe(ROUTER_QUERY_S, time.monotonic() - began_s)

    def _open(self, opened: OpenRequest, decision: RouteDecision, engine: PeerAddress) -> DeltaStream:
        message = opened.place(prefill=decision.prefill, eos_token_ids=self._model.eos_token_ids)
        attempt = opened.attempt
        stream = DeltaStream(message.request_id, engine.peer_id, num_tokens=opened.num_emitted, attempt=attempt)
        self._fallback.started(decision)
        self._streams[stream.request_id] = stream
        self._requests_by_peer.setdefault(stream.peer_id, set()).add(stream.request_id)
        attempt.engine, attempt.reason = stream.peer_id, decision.reason
        attempt.prefill = "" if decision.prefill is None else decision.prefill.peer_id
        attempt.sent_s = time.monotonic()  # the engine may have it before `send` returns
        attempt.note("route", attempt.sent_s)
        if not self._attached().send(engine, message):
            stream.fail(EngineLost(f"the engine {stream.peer_id} does not take requests", may_return=True))
        return stream

    def _close(self, stream: DeltaStream, decision: RouteDecision, *, is_finished: bool) -> None:
        endpoint = self._attached()
        self._fallback.finished(decision)
        self._streams.pop(stream.request_id, None)
        request_ids = self._requests_by_peer.get(stream.peer_id, set())
        request_ids.discard(stream.request_id)
        if not request_ids:
            self._requests_by_peer.pop(stream.peer_id, None)
        if not is_finished:
            endpoint.send(stream.peer_id, CancelRequest(stream.request_id))
        if self._router is not None:
            endpoint.send(self._router, RequestDone(decision.query_id))

    def _attached(self) -> Endpoint:
        if self._endpoint is None:
            raise NotReady("the ingress is still starting")
        return self._endpoint


def _log_of(opened: OpenRequest) -> FieldLogger:
    return logger.bind(request_id=opened.input.record.client_request_id or opened.input.request_id)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
