"""Engines and a router under a recorded mix of requests, in simulated time: every device runs on its own.

Unlike in `tests.fakes.Network`, where engines take turns, a long step of one does not hold up another: each engine has
a thread, of which one runs at a time, until it waits for its device or for a message. Then simulated time goes on to
the next moment at which anything happens. So the same requests always take the same time.
"""

from __future__ import annotations

import csv
import heapq
import itertools
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from atom_cluster.config.routing import RoutingConfig
from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.config.simulation import SimulationConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.protocols import ROUTER, EngineOutput
from atom_cluster.engine.sim_runner import SimulatedRunner
from atom_cluster.kv_cache.prefix_hash import hash_blocks, seed_of
from atom_cluster.messages.cluster import (
    CacheEvents,
    CacheSnapshot,
    MemberCard,
    PeerAddress,
    ReplicaLoad,
    RequestDone,
    Role,
    RouteQuery,
)
from atom_cluster.messages.requests import EngineRequest, SamplingParams, TokenBatch
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.routing.state import RouterState
from tests.fakes import VirtualClock

SAMPLE = Path(__file__).with_name("conversations.csv")
BLOCK_SIZE = 64
MESSAGE_S = 0.0005
"""That a message takes."""
POLL_S, IDLE_S = 0.001, 0.1
"""How often an engine looks for the end of reads, and an idle one at its clock."""

DEVICE = SimulationConfig(
    base_s=0.008,
    per_prefill_token_s=4e-5,
    per_decode_row_s=5e-5,
    per_context_token_s=1e-8,
    kv_bytes_per_s=5e10,
    num_blocks=6000,
)
"""In the manner of a model of eight billion parameters on one large GPU, with a link of 400 Gbit/s."""


@dataclass(frozen=True)
class Arrival:
    """A request of the sample."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int


def read_sample() -> list[Arrival]:
    """Consecutive requests of a conversation service, with the times at which they came."""
    with SAMPLE.open() as file:
        rows = csv.reader(line for line in file if not line.startswith("#"))
        return [Arrival(float(at_s), int(num_prompt), int(num_output)) for at_s, num_prompt, num_output in rows]


def at_rate(arrivals: list[Arrival], per_s: float) -> list[Arrival]:
    """The same, closer together or further apart."""
    factor = len(arrivals) / per_s / (arrivals[-1].at_s - arrivals[0].at_s)
    return [Arrival((a.at_s - arrivals[0].at_s) * factor, a.num_prompt_tokens, a.num_output_tokens) for a in arrivals]


@dataclass
class Told:
    """When one request's tokens came."""

    arrived_s: float
    at_s: list[float] = field(default_factory=list)
    """Once per token."""

    @property
    def ttft_s(self) -> float:
        return self.at_s[0] - self.arrived_s

    @property
    def itl_s(self) -> float:
        """Mean."""
        return (self.at_s[-1] - self.at_s[0]) / max(1, len(self.at_s) - 1)

    @property
    def longest_gap_s(self) -> float:
        return max((after - before for before, after in zip(self.at_s, self.at_s[1:])), default=0.0)


@dataclass
class Traffic:
    """One prefill and one decode engine, unless told otherwise. `run` sends the requests and waits for all answers."""

    transfer: KvTransferConfig = KvTransferConfig()
    layout: tuple[tuple[str, Role], ...] = (("prefill", "prefill"), ("decode", "decode"))
    """Names and roles of the engines."""
    device: SimulationConfig = DEVICE
    scheduler: SchedulerConfig = SchedulerConfig()
    router: RoutingConfig = RoutingConfig()
    clock: VirtualClock = field(default_factory=VirtualClock)
    metrics: MemoryMetrics = field(default_factory=MemoryMetrics)
    """Of the router."""
    told: dict[str, Told] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.engines: dict[str, EngineCore] = {}
        self.cards: dict[str, MemberCard] = {}
        self._actors: dict[str, _Actor] = {}
        self._num_over = 0
        self._random = random.Random(5)
        self.state = RouterState(
            config=self.router,
            address=PeerAddress(peer_id="router", endpoint="", epoch=1),
            member_timeout_s=1e9,
            min_remote_tokens=self.transfer.min_remote_tokens,
            conditional_prefill=self.transfer.conditional_prefill,
            metrics=self.metrics,
        )
        for name, role in self.layout:
            self.start(name, role)

    def start(self, name: str, role: Role) -> None:
        actor = self._actors[name] = _Actor(self.clock)
        runner = SimulatedRunner(
            simulation=self.device,
            block_size=BLOCK_SIZE,
            max_num_requests=self.scheduler.max_num_requests,
            max_model_len=16384,
            clock=actor,
        )
        address = PeerAddress(peer_id=name, endpoint=f"tcp://{name}:1", epoch=1)
        engine = EngineCore(
            runner=runner,
            outbox=_Outbox(self, name),
            scheduler=self.scheduler,
            transfer=self.transfer,
            metrics=MemoryMetrics(),
            peer=address,
            load_period_s=self.router.load_period_s,
            clock=self.clock,
        )
        self.engines[name] = engine
        card = MemberCard(
            address=address,
            kind="engine",
            role=role,
            fingerprint=engine.fingerprint,
            num_blocks=self.device.num_blocks,
            block_size=BLOCK_SIZE,
        )
        self._seed = seed_of(engine.fingerprint)
        self.cards[name] = card
        self.state.announce(card, self.clock.at_s)
        engine.request_snapshot()
        actor.begin(engine)

    def run(self, arrivals: list[Arrival]) -> list[Told]:
        """What came of each, in order."""
        for arrival in arrivals:
            self.at(arrival.at_s, lambda arrival=arrival: self.send(arrival))  # type: ignore[misc]
        try:
            while self._num_over < len(arrivals):
                self._advance()
        finally:
            for actor in self._actors.values():
                actor.end()
        return list(self.told.values())

    def be_away(self, name: str, from_s: float, to_s: float) -> None:
        """No new request goes to an engine in this time. When it comes back, the router knows nothing of it."""
        self.at(from_s, lambda: self.state.withdraw(name))
        self.at(to_s, lambda: self._come_back(name))

    def _come_back(self, name: str) -> None:
        self.state.announce(self.cards[name], self.clock.at_s)
        self.engines[name].request_snapshot()
        self._actors[name].call(self.clock.at_s)

    def at(self, at_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), action))

    def send(self, arrival: Arrival) -> None:
        """As the ingress does."""
        number = len(self.told)
        prompt = tuple(self._random.randrange(self.device.vocab_size) for _ in range(arrival.num_prompt_tokens))
        query = RouteQuery(
            query_id=number,
            block_hashes=(hash_blocks(prompt, BLOCK_SIZE, self._seed),),
            num_tokens=len(prompt),
            expected_output_tokens=arrival.num_output_tokens,
        )
        decision = self.state.decide(query, source="ingress", now_s=self.clock.at_s)
        assert decision.decode is not None
        request = EngineRequest(
            request_id=f"r{number}",
            token_ids=prompt,
            sampling=SamplingParams(seed=0, max_tokens=arrival.num_output_tokens, ignore_eos=True),
            prefill=decision.prefill,
        )
        self.told[request.request_id] = Told(self.clock.at_s)
        self._deliver(decision.decode.peer_id, "ingress", request)

    def post(self, source: str, destination: str | PeerAddress, message: EngineOutput) -> None:
        if isinstance(message, TokenBatch):
            self._take(message)
        elif destination == ROUTER:
            assert isinstance(message, (CacheEvents, CacheSnapshot, ReplicaLoad))
            self.at(self.clock.at_s + MESSAGE_S, lambda: self._inform(message))
        else:
            target = destination.peer_id if isinstance(destination, PeerAddress) else destination
            self._deliver(target, source, message)

    def _inform(self, message: CacheEvents | CacheSnapshot | ReplicaLoad) -> None:
        self.state.apply(message, self.clock.at_s)

    def _take(self, batch: TokenBatch) -> None:
        for delta in batch.deltas:
            told = self.told[delta.request_id]
            told.at_s += [self.clock.at_s] * len(delta.token_ids)
            if delta.finish_reason is not None:
                assert delta.finish_reason == "length", delta
                self._num_over += 1
                self.state.done(RequestDone(int(delta.request_id[1:])), source="ingress")

    def _deliver(self, target: str, source: str, message: object) -> None:
        def arrive() -> None:
            self.engines[target].put(source, message)  # type: ignore[arg-type]
            self._actors[target].call(self.clock.at_s)

        self.at(self.clock.at_s + MESSAGE_S, arrive)

    def _advance(self) -> None:
        """To the next moment at which anything can happen."""
        actor = min(self._actors.values(), key=lambda actor: actor.wakes_s)
        if self._events and self._events[0][0] <= actor.wakes_s:
            self.clock.at_s, _, action = heapq.heappop(self._events)
            action()
        else:
            self.clock.at_s = actor.wakes_s
            actor.go_on()


class _Actor:
    """An engine in a thread, which runs while nobody else does."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._may_run, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._is_over = False
        self._is_idle = False
        self.wakes_s = clock.at_s
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._failure: BaseException | None = None

    def begin(self, engine: EngineCore) -> None:
        self._engine = engine
        self._thread.start()

    def go_on(self) -> None:
        """Let it run until it waits."""
        self._may_run.release()
        self._has_stopped.acquire()
        if self._failure is not None:
            raise self._failure

    def call(self, now_s: float) -> None:
        """Something has come; it looks at once unless it waits for its device."""
        if self._is_idle:
            self.wakes_s = now_s

    def end(self) -> None:
        self._is_over = True
        self._may_run.release()
        self._thread.join()

    def now_s(self) -> float:
        return self._clock.at_s

    def sleep(self, seconds: float) -> None:
        """Called by the runner, in the engine's thread."""
        self._wait_until(self._clock.at_s + seconds)

    def _wait_until(self, wakes_s: float) -> None:
        self.wakes_s = wakes_s
        self._has_stopped.release()
        self._may_run.acquire()
        if self._is_over:
            raise SystemExit

    def _main(self) -> None:
        self._may_run.acquire()
        try:
            while not self._is_over:
                has_work = self._engine.step()
                if self._engine.stats().num_waiting or not self._is_quiet():
                    continue
                self._is_idle = True
                self._wait_until(self._clock.at_s + (POLL_S if has_work else IDLE_S))
                self._is_idle = False
        except SystemExit:
            pass
        except BaseException as exc:  # noqa: BLE001 raised again by whoever runs it
            self._failure = exc
            self._has_stopped.release()

    def _is_quiet(self) -> bool:
        """Whether a further turn would find nothing to do until something comes."""
        return self._engine._pipeline.is_empty and not self._engine._is_busy


@dataclass(frozen=True)
class _Outbox:
    traffic: Traffic
    name: str

    def send(self, destination: str | PeerAddress, message: EngineOutput) -> None:
        self.traffic.post(self.name, destination, message)


@dataclass(frozen=True)
class Outcome:
    """Of a run."""

    goodput: float
    """Share of the requests whose first token and others came in time."""
    mean_ttft_s: float
    p99_ttft_s: float
    mean_itl_s: float
    longest_gap_s: float
    """99th percentile of each request's longest wait between two tokens."""


def outcome(told: list[Told], *, ttft_s: float, itl_s: float) -> Outcome:
    """How a run did by these targets."""
    good = [one for one in told if one.ttft_s <= ttft_s and one.itl_s <= itl_s]
    return Outcome(
        goodput=len(good) / len(told),
        mean_ttft_s=fmean(one.ttft_s for one in told),
        p99_ttft_s=sorted(one.ttft_s for one in told)[int(0.99 * len(told))],
        mean_itl_s=fmean(one.itl_s for one in told),
        longest_gap_s=sorted(one.longest_gap_s for one in told)[int(0.99 * len(told))],
    )
