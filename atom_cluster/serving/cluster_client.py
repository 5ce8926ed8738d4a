"""Stop 4 of 14: a tokenized request leaves the ingress for the engine that the router names. Next: serving/router.py.

The ingress's side of the data plane, and the way back: token batches are split by request id and handed to whoever
iterates (stop 13). Requests never wait for the router longer than `routing.query_timeout_s`, and a request whose engine
is lost before its first token goes to another engine. Knows nothing of HTTP, text or templates.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from random import Random
from typing import Any

from atom_cluster.api.generator import GenerateInput
from atom_cluster.api.model_files import ServedModel
from atom_cluster.api.profile_types import ProfileRequest, ProfileTarget
from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.errors import NotReady, RequestFailed
from atom_cluster.kv_cache.prefix_hash import hash_blocks, seed_of
from atom_cluster.link.codec import Message
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import MemberCard, Membership, PeerAddress, RequestDone, RouteDecision, RouteQuery
from atom_cluster.messages.profile import ProfileAnswer
from atom_cluster.messages.requests import CancelRequest, EngineRequest, TokenBatch, TokenDelta
from atom_cluster.observability.metrics import REQUESTS_REPLAYED, ROUTER_DECISIONS, ROUTER_QUERY_S, MetricSink
from atom_cluster.routing.fallback import FallbackPlacer
from atom_cluster.serving.cluster_page import cluster_page, scrape_metrics
from atom_cluster.serving.profile_calls import ProfileCalls
from atom_cluster.serving.readiness import ReadinessProbe
from atom_cluster.serving.streams import DeltaStream, EngineLost
from atom_cluster.units import Deadline

logger = logging.getLogger(__name__)

MAX_PLACEMENTS = 3
"""Engines tried for one request before its first token."""
HASH_OFF_LOOP_TOKENS = 4096
"""Prompts longer than this are hashed in a thread."""
_GRACE_S = 5.0
"""The engine enforces a request's deadline; the ingress gives up this much later in case the engine does not."""


class ClusterClient:
    """Sends requests to engines and streams their tokens back. Used from one event loop."""

    def __init__(
        self, *, config: ClusterConfig, reasons: dict[str, str], model: ServedModel, metrics: MetricSink
    ) -> None:
        """`reasons` says why automatic choices of `config` are what they are; it is only shown."""
        self._config = config
        self._reasons = reasons
        self._model = model
        self._metrics = metrics
        self._endpoint: Endpoint | None = None
        self._membership: Membership | None = None
        self._router: PeerAddress | None = None
        self._router_since_s = 0.0
        self._engines: dict[str, MemberCard] = {}
        self._streams: dict[str, DeltaStream] = {}
        self._requests_by_peer: dict[str, set[str]] = {}
        self._queries: dict[int, asyncio.Future[RouteDecision]] = {}
        self._num_queries = 0
        self._fallback = FallbackPlacer(Random())
        self._profiles = ProfileCalls()
        self._readiness = ReadinessProbe(self, num_vocab_tokens=model.vocab_size, max_model_len=model.max_model_len)

    # --- membership and messages, called by the ingress deployment

    def attach(self, endpoint: Endpoint) -> None:
        """Use this endpoint, whose callbacks are `receive` and `lose`."""
        self._endpoint = endpoint

    @property
    def has_open_requests(self) -> bool:
        """Whether any request is under way."""
        return bool(self._streams)

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
        self._engines = {**self._engines, **engines} if is_new else engines
        endpoint.connect(membership.router)
        for card in self._engines.values():
            if card.role != "prefill":
                endpoint.connect(card.address)

    def receive(self, source: str, message: Message) -> None:
        """Take a message from the endpoint."""
        if isinstance(message, TokenBatch):
            for delta in message.deltas:
                stream = self._streams.get(delta.request_id)
                if stream is not None:
                    stream.push(delta)
        elif isinstance(message, RouteDecision):
            query = self._queries.get(message.query_id)
            if query is not None and not query.done():
                query.set_result(message)
        elif isinstance(message, ProfileAnswer):
            self._profiles.receive(source, message)
        else:
            logger.warning("dropped a %s from %s", type(message).__name__, source)

    def lose(self, peer_id: str) -> None:
        """A peer is gone: end its requests (those without a token yet are placed anew by their readers)."""
        self._engines.pop(peer_id, None)
        self._profiles.lose(peer_id)
        if self._router is not None and self._router.peer_id == peer_id:
            self._router = None
        for request_id in self._requests_by_peer.pop(peer_id, set()):
            self._streams[request_id].fail(EngineLost(f"the engine {peer_id} was lost"))

    # --- requests, called by the API

    async def generate(self, request: GenerateInput) -> AsyncGenerator[TokenDelta, None]:
        """See `api.generator.Generator`."""
        deadline = Deadline.after(self._config.serving.request_timeout_s)
        excluded: list[str] = []
        for _ in range(MAX_PLACEMENTS):
            decision = await self._place(request, excluded)
            stream = self._open(request, decision, deadline)
            is_over = False
            try:
                while not is_over:
                    delta = await stream.read(Deadline.after(deadline.remaining_s + _GRACE_S))
                    is_over = delta.finish_reason is not None
                    yield delta
                return
            except (EngineLost, NotReady):
                is_over = True
                if stream.num_tokens:
                    raise
                excluded.append(stream.peer_id)
                self._metrics.inc(REQUESTS_REPLAYED)
                logger.info("request %s is placed again: %s is lost or draining", request.request_id, stream.peer_id)
            finally:
                self._close(stream, decision, is_finished=is_over)
        raise RequestFailed(f"{MAX_PLACEMENTS} engines were lost, one after the other, before the first token")

    async def check_ready(self) -> None:
        """See `api.generator.Generator`."""
        await self._readiness.check()

    def cluster_state(self) -> dict[str, Any]:
        """See `api.generator.Generator`."""
        return cluster_page(self._config, self._reasons, self._membership)

    async def metrics_text(self) -> str:
        """See `api.generator.Generator`."""
        return await scrape_metrics()

    async def start_profile(self, request: ProfileRequest) -> dict[str, Any]:
        """See `api.generator.Generator`."""
        return await self._profiles.start(self._attached(), self._engines.values(), request)

    async def stop_profile(self, target: ProfileTarget) -> dict[str, Any]:
        """See `api.generator.Generator`."""
        return await self._profiles.stop(self._attached(), self._engines.values(), target)

    async def _place(self, request: GenerateInput, excluded: list[str]) -> RouteDecision:
        """Ask the router, or place by load alone when it is away. Raises `NotReady` when nobody can take it."""
        self._num_queries += 1
        query = RouteQuery(
            query_id=self._num_queries,
            block_hashes=await self._hash_prompt(request.token_ids),
            num_tokens=len(request.token_ids),
            expected_output_tokens=request.sampling.max_tokens or 0,
            excluded=tuple(excluded),
        )
        decision = await self._ask_router(query)
        if decision is None or decision.decode is None:
            # Away, or too new to know anybody.
            decision = self._fallback.decide(query, self._engines.values())
            self._metrics.inc(ROUTER_DECISIONS, reason=decision.reason)
        if decision.decode is None:
            raise NotReady(f"no replica can take the request: {decision.reason}", retry_after_s=2.0)
        return decision

    async def _hash_prompt(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        card = next((card for card in self._engines.values() if card.role != "prefill"), None)
        if card is None:
            return ()
        arguments = (token_ids, card.block_size, seed_of(card.fingerprint))
        if len(token_ids) > HASH_OFF_LOOP_TOKENS:
            return await asyncio.to_thread(hash_blocks, *arguments)
        return hash_blocks(*arguments)

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

    def _open(self, request: GenerateInput, decision: RouteDecision, deadline: Deadline) -> DeltaStream:
        if decision.decode is None:
            raise AssertionError("an unplaced request has no stream")
        stream = DeltaStream(request.request_id, decision.decode.peer_id)
        self._fallback.started(decision)
        self._streams[stream.request_id] = stream
        self._requests_by_peer.setdefault(stream.peer_id, set()).add(stream.request_id)
        is_sent = self._attached().send(
            decision.decode,
            EngineRequest(
                request_id=request.request_id,
                token_ids=request.token_ids,
                sampling=request.sampling,
                eos_token_ids=self._model.eos_token_ids,
                prefill=decision.prefill,
                deadline_s=deadline.remaining_s,
            ),
        )
        if not is_sent:
            stream.fail(EngineLost(f"the engine {stream.peer_id} does not take requests"))
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
