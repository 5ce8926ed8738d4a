"""Engine hosts on loopback and clients that talk to them over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.simulation import SimulationConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.protocols import StepRunner
from atom_cluster.engine.sim_runner import SimulatedRunner
from atom_cluster.engine_server.host import EngineHost
from atom_cluster.engine_server.settings import EngineHostSettings
from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.codec import Message
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import MemberCard, Role
from atom_cluster.messages.requests import TokenBatch
from atom_cluster.observability.memory import MemoryMetrics
from tests.factories import BLOCK_SIZE, VOCAB_SIZE
from tests.fakes import Answer

SECRET = b"a secret of the cluster"


async def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Return when the condition has come true."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        await asyncio.sleep(0.005)


class Client:
    """An endpoint that records everything; token batches also as answers."""

    def __init__(self, peer_id: str) -> None:
        self.received: list[Message] = []
        self.answers: dict[str, Answer] = {}
        self.lost: list[str] = []
        self.endpoint = Endpoint(
            key=ClusterKey.from_secret(SECRET),
            peer_id=peer_id,
            host="127.0.0.1",
            epoch=1,
            on_message=self._receive,
            on_lost=self.lost.append,
            ping_period_s=0.2,
        )

    def _receive(self, source: str, message: Message) -> None:
        self.received.append(message)
        if isinstance(message, TokenBatch):
            for delta in message.deltas:
                self.answers.setdefault(delta.request_id, Answer()).take(delta)

    def num_tokens(self, request_id: str) -> int:
        """Output tokens so far."""
        return len(self.answers[request_id].tokens) if request_id in self.answers else 0

    async def finished(self, request_id: str) -> Answer:
        """The whole answer."""
        await eventually(lambda: request_id in self.answers and self.answers[request_id].final is not None)
        return self.answers[request_id]


@dataclass
class RunningHost:
    """A host that was started."""

    host: EngineHost
    card: MemberCard
    runner: StepRunner
    metrics: MemoryMetrics

    async def close(self) -> None:
        """End it, without keeping this event loop from what goes on meanwhile."""
        await asyncio.to_thread(self.host.close)

    async def idle(self) -> None:
        """Return once nothing is left of any request."""

        def is_clean() -> bool:
            blocks = self.host.status().blocks_by_state
            return self.host.is_idle() and blocks["free"] + blocks["cached"] == self.runner.info.num_blocks

        await eventually(is_clean)


def make_slow_runner(base_s: float = 0.0, *, per_prefill_token_s: float = 0.0) -> SimulatedRunner:
    """A simulated device in real time, with tokens like those of `tests.factories.expected_tokens`."""
    return SimulatedRunner(
        simulation=SimulationConfig(
            base_s=base_s,
            per_prefill_token_s=per_prefill_token_s,
            per_decode_row_s=0.0,
            num_blocks=2048,
            vocab_size=VOCAB_SIZE,
        ),
        block_size=BLOCK_SIZE,
        max_num_requests=8,
        max_model_len=4096,
    )


def make_settings(
    peer_id: str = "engine",
    role: Role = "unified",
    *,
    secret: bytes = SECRET,
    scheduler: SchedulerConfig | None = None,
    client_timeout_s: float = 5.0,
) -> EngineHostSettings:
    """Settings of a host on loopback; every prompt is worth a prefill engine."""
    return EngineHostSettings(
        peer_id=peer_id,
        role=role,
        model="simulated",
        secret=secret,
        scheduler=scheduler or SchedulerConfig(),
        transfer=KvTransferConfig(min_remote_tokens=1),
        load_period_s=0.01,
        ping_period_s=0.2,
        client_timeout_s=client_timeout_s,
    )


@dataclass
class Stage:
    """Starts hosts and clients, and closes them."""

    hosts: list[RunningHost] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    async def host(self, runner: StepRunner | None = None, settings: EngineHostSettings | None = None) -> RunningHost:
        """Start an engine host; a fast unified one unless told otherwise."""
        runner, metrics = runner or make_slow_runner(), MemoryMetrics()
        host = EngineHost(runner=runner, settings=settings or make_settings(), metrics=metrics)
        running = RunningHost(host, await asyncio.to_thread(host.start), runner, metrics)
        self.hosts.append(running)
        return running

    async def client(self, peer_id: str = "ingress") -> Client:
        """Start a client."""
        client = Client(peer_id)
        await client.endpoint.start()
        self.clients.append(client)
        return client


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    for running in stage.hosts:
        await running.close()
    for client in stage.clients:
        await client.endpoint.close()
