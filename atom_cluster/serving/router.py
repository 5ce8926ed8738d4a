"""Stop 5 of 14: the router actor chooses a prefill and a decode replica. Next: atom_cluster/routing/policy.py.

I/O around `RouterState`: announcements come through the Serve handle; queries, load and cache events over ZMQ. The
router connects to every engine that announces itself, asks for a snapshot of its cache and thereby subscribes to its
events and load. It keeps nothing that the replicas cannot tell it again, so a restarted router is soon as good as the
one before, and nobody waits for it meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import random

import ray
from ray import serve
from ray.util import get_node_ip_address

from atom_cluster.config.cluster import ClusterConfig
from atom_cluster.gang.ray_metrics import RayMetrics
from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.codec import Message
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.link.lived_time import LivedTime
from atom_cluster.messages.cluster import (
    CacheEvents,
    CacheSnapshot,
    MemberCard,
    Membership,
    PeerAddress,
    ReplicaLoad,
    RequestDone,
    RouteDecision,
    RouteQuery,
)
from atom_cluster.observability.logging import get_logger
from atom_cluster.routing.state import RouterState
from atom_cluster.serving.fence import Fence
from atom_cluster.serving.recording import set_up_logs
from atom_cluster.serving.secret import cluster_secret

_logger = get_logger(__name__)


class Router:
    """The router's Serve deployment: one replica, light, restarted by Serve when it dies."""

    async def __init__(self, config: ClusterConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        replica_id = serve.get_replica_context().replica_id.unique_id
        set_up_logs(config.observability, role="router", replica=f"router-{replica_id}")
        self._endpoint = Endpoint(
            key=ClusterKey.from_secret(cluster_secret()),
            peer_id=f"router-{replica_id}",
            host=get_node_ip_address(),
            epoch=random.getrandbits(62),
            on_message=self._receive,
            on_lost=self._lose,
            ping_period_s=config.serving.ping_period_s,
            peer_timeout_s=config.serving.client_timeout_s,
        )
        self._state = RouterState(
            config=config.router,
            address=await self._endpoint.start(),
            member_timeout_s=config.serving.member_timeout_s,
            min_remote_tokens=config.kv_transfer.min_remote_tokens,
            # Under `decode_only` prompts wait at decode until nothing decodes, which no measured time tells.
            conditional_prefill=config.kv_transfer.conditional_prefill and config.scheduler.policy != "decode_only",
            metrics=RayMetrics(labels={"role": "router", "replica": replica_id}),
        )
        self._fence = Fence(
            num_ingresses=config.serving.ingress_replicas, silence_s=config.serving.fence_after_s, end=self._end
        )
        self._ending: set[asyncio.Task[None]] = set()
        # Members are not silent while this process has no time to hear them.
        self._lived = LivedTime(2 * config.serving.announce_period_s)

    async def announce(self, card: MemberCard) -> Membership:
        """Take a member's card and return everybody's; engines that are new here are asked for a snapshot."""
        now_s = self._lived.look()
        membership = self._state.announce(card, now_s)
        self._fence.heard(card, now_s)
        self._fence.look(now_s)
        for address, request in self._state.wanted_snapshots(now_s):
            self._endpoint.send(address, request)
        return membership

    async def withdraw(self, address: PeerAddress) -> Membership:
        """A member is leaving for good."""
        self._endpoint.disconnect(address.peer_id)
        self._state.withdraw(address.peer_id)
        return self._state.membership(self._lived.now_s)

    def _receive(self, source: str, message: Message) -> None:
        now_s = self._lived.now_s
        if isinstance(message, RouteQuery):
            decision = self._state.decide(message, source=source, now_s=now_s)
            self._endpoint.send(source, decision)
            _log_decision(message, decision)
        elif isinstance(message, RequestDone):
            self._state.done(message, source=source)
        elif isinstance(message, (CacheEvents, CacheSnapshot, ReplicaLoad)):
            request = self._state.apply(message, now_s)
            if request is not None:
                self._endpoint.send(source, request)
        else:
            self._endpoint.note_unexpected(source, message)

    def _lose(self, peer_id: str) -> None:
        # A member that is only slow announces itself again; one that died must not get requests until it times out.
        self._state.withdraw(peer_id, change="lost")

    def _end(self, actor: str) -> None:
        task = asyncio.get_running_loop().create_task(asyncio.to_thread(_end_actor, actor))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def __del__(self) -> None:
        """Serve calls and awaits this when the replica stops."""
        await asyncio.wait_for(self._endpoint.close(), timeout=5.0)


def _end_actor(name: str) -> None:
    """End an actor of Serve by force; nothing if there is none of the name."""
    try:
        actor = ray.get_actor(name, namespace=ray.get_runtime_context().namespace)
    except ValueError:
        return  # it died, and was not standing still
    _logger.warning("%s has been replaced and stands still: its process is ended", name)
    ray.kill(actor)


def _log_decision(query: RouteQuery, decision: RouteDecision) -> None:
    if _logger.isEnabledFor(logging.DEBUG):
        engine = "none" if decision.decode is None else decision.decode.peer_id
        prefill = "none" if decision.prefill is None else decision.prefill.peer_id
        _logger.bind(request_id=query.client_request_id, engine=engine, prefill=prefill).debug(
            "placed %d tokens: %s", query.num_tokens, decision.reason
        )
