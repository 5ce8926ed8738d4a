"""EngineWatch: how engines are this very moment, asked over the cluster's own network. Knows no scenarios.

/v1/cluster shows what engines announced last, which may be a second and a half old. A member of the network may ask an
engine itself and has the answer in a few milliseconds, whatever step the engine is in.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.codec import Message
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import EngineStatus, PeerAddress, StatusAnswer, StatusRequest
from atom_cluster.tools.drill.cluster import CALM

_ANSWER_TIMEOUT_S = 2.0

T = TypeVar("T")


class EngineWatch:
    """A member that only asks. Owns a thread and a socket until `close`."""

    def __init__(self, *, secret: bytes, host: str) -> None:
        """host: an address of this node that the engines can reach."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="drill-watch", daemon=True)
        self._thread.start()
        self._answers: dict[str, asyncio.Future[EngineStatus]] = {}
        self._endpoint = Endpoint(
            key=ClusterKey.from_secret(secret),
            peer_id=f"drill-{random.getrandbits(32):08x}",
            host=host,
            epoch=random.getrandbits(62),
            on_message=self._receive,
            on_lost=lambda peer_id: None,
        )
        self._do(self._endpoint.start())

    def statuses(self, engines: Iterable[PeerAddress]) -> dict[str, EngineStatus]:
        """By peer id. An engine that does not answer within two seconds is left out."""
        return self._do(self._ask(tuple(engines)))

    def close(self) -> None:
        """Leave the network."""
        self._do(self._endpoint.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ask(self, engines: tuple[PeerAddress, ...]) -> dict[str, EngineStatus]:
        self._answers = {engine.peer_id: self._loop.create_future() for engine in engines}
        for engine in engines:
            self._endpoint.send(engine, StatusRequest())
        if self._answers:
            await asyncio.wait(self._answers.values(), timeout=_ANSWER_TIMEOUT_S)
        return {peer_id: answer.result() for peer_id, answer in self._answers.items() if answer.done()}

    def _receive(self, source: str, message: Message) -> None:
        answer = self._answers.get(source)
        if isinstance(message, StatusAnswer) and answer is not None and not answer.done():
            answer.set_result(message.status)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def addresses_of(replicas: Iterable[dict[str, Any]]) -> list[PeerAddress]:
    """Of the engines as /v1/cluster shows them."""
    return [
        PeerAddress(peer_id=replica["id"], endpoint=replica["endpoint"], epoch=replica["epoch"]) for replica in replicas
    ]


def num_held(status: EngineStatus) -> int:
    """Blocks that are neither free nor cached, requests, and tickets."""
    pages = (status.blocks_by_state, *status.other_pages_by_state.values())
    num_blocks = sum(count for states in pages for state, count in states.items() if state not in CALM)
    return num_blocks + status.num_running + status.num_waiting + status.num_tickets
