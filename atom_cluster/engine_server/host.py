"""Stop 6 of 14: a request arrives at its engine over ZMQ. Next: atom_cluster/engine/core.py.

EngineHost joins an `EngineCore`, which runs in a thread of its own, to an `Endpoint`, which runs on an event loop in
another. Messages for the engine are queued to it, messages from it are queued to the endpoint; neither waits for the
other. A lost peer is both a client whose requests end and an engine whose tickets end. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import threading
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, TypeVar, get_args

from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.protocols import ROUTER, EngineInput, EngineOutput, StepRunner
from atom_cluster.engine.step_meter import record_start
from atom_cluster.engine_server.faults import FaultyDelivery
from atom_cluster.engine_server.outbox import Destination, LinkOutbox
from atom_cluster.engine_server.settings import EngineHostSettings
from atom_cluster.errors import NotReady
from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.codec import Message
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.link.slow_line import line_of
from atom_cluster.messages.cluster import (
    EngineStatus,
    MemberCard,
    PeerAddress,
    SnapshotRequest,
    StatusAnswer,
    StatusRequest,
)
from atom_cluster.messages.profile import ProfileAnswer, StartProfile, StopProfile
from atom_cluster.messages.requests import EngineRequest, RequestError, TokenBatch, TokenDelta
from atom_cluster.messages.transfer import PrefillFailed, PrefillOrder
from atom_cluster.observability.metrics import BUILD_INFO, MetricSink
from atom_cluster.observability.process import build_labels

logger = logging.getLogger(__name__)

T = TypeVar("T")

_INPUTS = get_args(EngineInput)
_START_TIMEOUT_S = 30.0


class EngineHost:
    """See the module docstring. Owns the runner: `close` closes it. Methods may be called from any thread."""

    def __init__(self, *, runner: StepRunner, settings: EngineHostSettings, metrics: MetricSink) -> None:
        self._runner = runner
        self._settings = settings
        self._metrics = metrics
        self._epoch = random.getrandbits(62)
        self._subscribers: set[str] = set()
        self._failure: str | None = None
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self._loop.run_forever, name="engine-endpoint", daemon=True)
        self._engine_thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        # In reverse order of what was begun, so that `close` also cleans up after a start that failed half-way.
        self._closers = ExitStack()
        self._closers.callback(runner.close)
        self._closers.callback(self._loop.close)

    def start(self) -> MemberCard:
        """Listen and begin to serve; what to announce about this engine."""
        settings, info = self._settings, self._runner.info
        self._loop_thread.start()
        self._closers.callback(self._stop_loop)
        record_start(info.start, {**settings.choices, **info.choices}, self._metrics)
        self._metrics.set(BUILD_INFO, 1, **build_labels(settings.model))
        address = self._on_loop(self._listen())
        self._engine_thread.start()
        self._closers.callback(self._stop_engine)
        return MemberCard(
            address=address,
            kind="engine",
            role=settings.role,
            model=settings.model,
            fingerprint=self._core.fingerprint,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            node=socket.gethostname(),
            pid=os.getpid(),
            choices={**settings.choices, **info.choices},
        )

    async def _listen(self) -> PeerAddress:
        """Open the endpoint and make the engine behind it, in one turn of the loop: no message comes in between."""
        settings = self._settings
        self._endpoint = Endpoint(
            key=ClusterKey.from_secret(settings.secret),
            peer_id=settings.peer_id,
            host=settings.host,
            epoch=self._epoch,
            on_message=self._receive,
            on_lost=self._lose,
            ping_period_s=settings.ping_period_s,
            peer_timeout_s=settings.client_timeout_s,
            line=None if settings.faults is None else line_of(settings.faults),
        )
        address = await self._endpoint.start()
        self._closers.callback(lambda: self._on_loop(self._endpoint.close()))
        deliver: Callable[[Destination, EngineOutput], None] = self._deliver
        if settings.faults is not None:
            logger.warning("faults on purpose: %s", settings.faults)
            deliver = FaultyDelivery(deliver, settings.faults, loop=self._loop, name=settings.peer_id)
        self._core = EngineCore(
            runner=self._runner,
            outbox=LinkOutbox(self._loop, deliver),
            scheduler=settings.scheduler,
            transfer=settings.transfer,
            prefix_caching=settings.prefix_caching,
            peer=address,
            load_period_s=settings.load_period_s,
            metrics=self._metrics,
        )
        return address

    def status(self) -> EngineStatus:
        """The engine now."""
        return self._core.stats()

    def begin_drain(self, timeout_s: float) -> None:
        """Refuse new requests from now on; finish those there are, and move what is left after so long."""
        self._core.begin_drain(timeout_s)

    def is_idle(self) -> bool:
        """Whether no request and no ticket is left."""
        status = self.status()
        return not (status.num_running or status.num_waiting or status.num_tickets)

    def failure(self) -> str | None:
        """Why the engine stopped by itself; None while it runs."""
        return self._failure

    def close(self) -> None:
        """Stop the engine, close its runner and its sockets. Idempotent."""
        self._closers.close()

    def _stop_engine(self) -> None:
        self._core.stop()
        self._engine_thread.join(timeout=_START_TIMEOUT_S)

    def _stop_loop(self) -> None:
        self._on_loop(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop_thread.join(timeout=_START_TIMEOUT_S)

    # --- engine's thread

    def _run_engine(self) -> None:
        try:
            self._core.run()
        except Exception as exc:
            logger.exception("the engine stopped")
            self._failure = f"{type(exc).__name__}: {exc}"

    # --- event loop's thread

    def _receive(self, source: str, message: Message) -> None:
        if isinstance(message, SnapshotRequest):
            self._subscribers.add(source)
            self._core.request_snapshot()
        elif isinstance(message, StatusRequest):
            self._endpoint.send(source, StatusAnswer(epoch=self._epoch, status=self.status()))
        elif isinstance(message, (EngineRequest, PrefillOrder)) and (reason := self._reason_to_refuse()) is not None:
            self._endpoint.send(source, _refusal(message, reason))
        elif isinstance(message, (StartProfile, StopProfile)) and self._failure is not None:
            self._endpoint.send(source, ProfileAnswer(call_id=message.call_id, error=self._reason_to_refuse()))
        elif isinstance(message, _INPUTS):
            self._core.put(source, message)
        else:
            self._endpoint.note_unexpected(source, message)

    def _reason_to_refuse(self) -> str | None:
        # A failed engine reads no message any more, and it takes a while until its gang has been replaced.
        return None if self._failure is None else f"the engine failed: {self._failure}"

    def _lose(self, peer_id: str) -> None:
        self._subscribers.discard(peer_id)
        self._core.drop_peer(peer_id)

    def _deliver(self, destination: Destination, message: EngineOutput) -> None:
        if destination == ROUTER:
            for subscriber in tuple(self._subscribers):
                self._endpoint.send(subscriber, message)
        else:
            self._endpoint.send(destination, message)

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_TIMEOUT_S)


def _refusal(message: EngineRequest | PrefillOrder, text: str) -> TokenBatch | PrefillFailed:
    if isinstance(message, PrefillOrder):
        return PrefillFailed(ticket_id=message.ticket_id, kind=NotReady.__name__, message=text)
    error = RequestError(kind=NotReady.__name__, message=text, retry_after_s=1.0)
    return TokenBatch((TokenDelta(request_id=message.request_id, first_index=0, finish_reason="error", error=error),))
