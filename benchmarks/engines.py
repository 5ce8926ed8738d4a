"""Engines in processes of this host, without Ray, and a front end that places requests among them, without HTTP.

What requests meet is what a cluster has: engine hosts, authenticated ZMQ, tickets, KV transports, the router's own
decisions (`RouterState`, here in the front end's process). Ray only starts and watches a cluster's processes; here a
pipe does. An engine's process keeps its model when its role or its scheduler changes, since both belong to its host.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, cast

from atom_cluster.config.routing import RoutingConfig
from atom_cluster.config.transfer import KvTransferConfig
from atom_cluster.engine.local_runner import LocalRunner
from atom_cluster.engine.protocols import RunnerInfo, StepRunner
from atom_cluster.engine_server.host import EngineHost
from atom_cluster.engine_server.settings import EngineHostSettings
from atom_cluster.link.auth import ClusterKey
from atom_cluster.link.codec import Message
from atom_cluster.link.endpoint import Endpoint
from atom_cluster.messages.cluster import (
    CacheEvents,
    CacheSnapshot,
    MemberCard,
    ReplicaLoad,
    RequestDone,
    RouteDecision,
    RouteQuery,
)
from atom_cluster.messages.requests import CancelRequest, EngineRequest, SamplingParams, TokenBatch, TokenDelta
from atom_cluster.messages.steps import StepPlan, StepResult
from atom_cluster.observability.logging import setup_logging
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import ROUTER_PLACES
from atom_cluster.routing.prompt_place import PLACES
from atom_cluster.routing.state import RouterState
from atom_cluster.runner.build import build_model_runner
from atom_cluster.runner.options import RunnerOptions
from benchmarks.client import RequestRecord

Numbers = dict[str, float]
"""Of an engine's metrics by name: counters, and of histograms `<name>_sum`, `<name>_count` and `<name>_bucket<=0.5`,
which counts observations up to that; over all labels."""

_START_S = 600.0
_ANSWER_S = 60.0
_MAX_STEPS = 20_000
"""That an engine remembers until it is asked."""


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One step of an engine."""

    seconds: float
    """On the device, from its first kernel to its last."""
    num_rows: int
    num_tokens: int
    """Computed; as many as rows if the step only decodes, without drafts."""
    num_commands: int
    """For KV transfers."""


class EngineProcess:
    """A process with a model, which serves as one engine after another. `close` it."""

    def __init__(self, name: str, options: RunnerOptions) -> None:
        """Begins to load; `wait` until it is done."""
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(name, options, theirs), name=name, daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> RunnerInfo:
        """What the runner turned out to be. Raises RuntimeError if it did not come up."""
        return cast("RunnerInfo", self._answer(_START_S))

    def serve(self, settings: EngineHostSettings) -> MemberCard:
        """Be this engine from now on. What the last one had left to do is lost."""
        return cast("MemberCard", self._call("serve", settings))

    def numbers(self) -> Numbers:
        """The engine's metrics since it began to serve."""
        return cast("Numbers", self._call("numbers"))

    def steps(self) -> list[TimedStep]:
        """Its steps since it was last asked, or began to serve; no more than the newest twenty thousand."""
        return cast("list[TimedStep]", self._call("steps"))

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(_ANSWER_S)
        if self._process.is_alive():
            self._process.kill()

    def _call(self, *command: Any) -> Any:
        self._pipe.send(command)
        return self._answer(_ANSWER_S)

    def _answer(self, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise RuntimeError(f"{self.name} did not answer within {timeout_s:.0f} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} ended") from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"{self.name}: {type(answer).__name__}: {answer}")
        return answer


def _work(name: str, options: RunnerOptions, pipe: Connection) -> None:
    """An engine's process, until the other end of its pipe is closed."""
    setup_logging("WARNING", replica=name, rank=0)
    try:
        runner = LocalRunner(build_model_runner(options))
    except Exception as exc:  # noqa: BLE001 - told to the other end, which raises it
        pipe.send(RuntimeError(f"{type(exc).__name__}: {exc}"))
        return
    pipe.send(runner.info)
    host, metrics, kept = None, MemoryMetrics(), _Kept(runner)
    try:
        while True:
            command, *arguments = pipe.recv()
            if command == "serve":
                if host is not None:
                    host.close()
                    kept.settle()
                metrics, kept = MemoryMetrics(), _Kept(runner)
                host = EngineHost(runner=cast("StepRunner", kept), settings=arguments[0], metrics=metrics)
                pipe.send(host.start())
            elif command == "steps":
                pipe.send(kept.take_steps())
            else:
                pipe.send(_numbers(metrics))
    except EOFError:
        pass
    finally:
        if host is not None:
            host.close()
        runner.close()


class _Kept:
    """A runner that outlives its engine host, and what its steps took."""

    def __init__(self, runner: LocalRunner) -> None:
        self.info, self.poll_kv = runner.info, runner.poll_kv
        self._runner = runner
        self._in_flight: deque[tuple[int, int, int]] = deque()
        self._taken_rows: set[int] = set()
        self._steps: deque[TimedStep] = deque(maxlen=_MAX_STEPS)

    def submit(self, plan: StepPlan) -> None:
        """See `StepRunner`."""
        self._runner.submit(plan)
        self._taken_rows.difference_update(plan.freed_rows)
        self._taken_rows.update(new.row for new in plan.new_rows)
        self._in_flight.append((len(plan.rows), plan.num_tokens, len(plan.kv)))

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        """See `StepRunner`."""
        result = self._runner.collect(timeout_s)
        if result is not None:
            self._steps.append(TimedStep(result.run_s, *self._in_flight.popleft()))
        return result

    def take_steps(self) -> list[TimedStep]:
        """From another thread than the engine's, which may add one meanwhile: it stays for the next time."""
        return [self._steps.popleft() for _ in range(len(self._steps))]

    def settle(self) -> None:
        """Take the results that the engine left behind, and free its rows: the next one would take those results for
        its own, and these rows for free ones."""
        if self._taken_rows:
            self.submit(StepPlan(step_id=0, freed_rows=tuple(sorted(self._taken_rows))))
        while self._in_flight:
            self.collect()
        self.poll_kv()

    def close(self) -> None:
        """It goes on."""


def _numbers(metrics: MemoryMetrics) -> Numbers:
    numbers: Numbers = {}
    lines = (line for _, found in metrics.sample_lines({}).values() for line in found)
    for line in lines:
        name, _, value = line.rpartition(" ")
        name, _, labels = name.partition("{")
        if name.endswith("_bucket"):
            name += "<=" + labels.rpartition("le=")[2].strip('"}')
        numbers[name] = numbers.get(name, 0.0) + float(value)
    return numbers


@dataclass(slots=True)
class Answer:
    """What came back for one request."""

    record: RequestRecord
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    placed: str = ""
    """Prefill and decode as the router chose them."""
    is_finished: bool = False
    """Whether the engine said that it was over."""
    is_cut: bool = False
    """Whether `cut` ended it."""
    over: asyncio.Event = field(default_factory=asyncio.Event)


class FrontEnd:
    """An ingress and a router in one. Used from one event loop; `start` first, `close` at the end."""

    def __init__(self, cards: Sequence[MemberCard], *, secret: bytes, transfer: KvTransferConfig) -> None:
        """Requests go to the engines of these cards, which have been told the same `transfer`."""
        self._cards = {card.address.peer_id: card for card in cards}
        self._transfer = transfer
        self._metrics = MemoryMetrics()
        self._answers: dict[str, Answer] = {}
        self._placed_at: dict[str, str] = {}
        self._num_requests = 0
        self._ready: set[str] = set()
        self._endpoint = Endpoint(
            key=ClusterKey.from_secret(secret),
            peer_id=f"front-end-{random.getrandbits(32):x}",
            host="127.0.0.1",
            epoch=random.getrandbits(62),
            on_message=self._receive,
            on_lost=self._lose,
        )

    async def start(self) -> None:
        """Connect to all engines and wait until each has told its load. Raises RuntimeError if one does not."""
        address = await self._endpoint.start()
        self._router = RouterState(
            config=RoutingConfig(),
            address=address,
            member_timeout_s=1e9,
            min_remote_tokens=self._transfer.min_remote_tokens,
            conditional_prefill=self._transfer.conditional_prefill,
            metrics=self._metrics,
        )
        now_s = time.monotonic()
        for card in self._cards.values():
            self._router.announce(card, now_s)
        for engine, request in self._router.wanted_snapshots(now_s):
            self._endpoint.send(engine, request)
        while self._ready != self._cards.keys():
            if time.monotonic() > now_s + _ANSWER_S:
                raise RuntimeError(f"no snapshot from {sorted(self._cards.keys() - self._ready)}")
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Disconnect; engines end what is left of this front end's requests."""
        await self._endpoint.close()

    async def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        due_s: float | None = None,
        decision: RouteDecision | None = None,
    ) -> Answer:
        """The answer; what went wrong is in its record. Cancelled, it cancels the request.

        due_s: when it should have been sent, for a client that is late; latencies count from then. decision: where to
        send it, unless the router is to say.
        """
        answer = Answer(RequestRecord(sent_s=time.monotonic() if due_s is None else due_s))
        self._num_requests += 1
        request_id, query_id = f"r{self._num_requests}", self._num_requests
        query = RouteQuery(
            query_id=query_id,
            block_hashes=(),
            num_tokens=len(prompt),
            expected_output_tokens=sampling.max_tokens or 0,
        )
        if decision is None:
            decision = self._router.decide(query, source="front-end", now_s=time.monotonic())
        if decision.decode is None:
            answer.record.error = decision.reason
            return answer
        answer.placed = f"{'' if decision.prefill is None else decision.prefill.peer_id} {decision.decode.peer_id}"
        request = EngineRequest(
            request_id=request_id, token_ids=tuple(prompt), sampling=sampling, prefill=decision.prefill
        )
        self._answers[request_id] = answer
        self._placed_at[request_id] = decision.decode.peer_id
        try:
            self._endpoint.send(decision.decode, request)
            await answer.over.wait()
        finally:
            if not answer.is_finished:
                answer.record.ended_s = time.monotonic()
                self._endpoint.send(decision.decode.peer_id, CancelRequest(request_id))
            del self._answers[request_id], self._placed_at[request_id]
            self._router.done(RequestDone(query_id), source="front-end")
        return answer

    def places(self) -> Numbers:
        """Where the router had prompts computed so far, of `prompt_place.PLACES`, and how many."""
        return {place: self._metrics.value(ROUTER_PLACES, place=place) for place in PLACES}

    def cut(self) -> None:
        """End all requests; their answers are what has come so far."""
        for answer in self._answers.values():
            answer.is_cut = True
            answer.over.set()

    def _receive(self, source: str, message: Message) -> None:
        now_s = time.monotonic()
        if isinstance(message, TokenBatch):
            for delta in message.deltas:
                answer = self._answers.get(delta.request_id)
                if answer is not None:
                    _take(answer, delta, now_s)
        elif isinstance(message, (CacheEvents, CacheSnapshot, ReplicaLoad)):
            self._ready.add(source)
            request = self._router.apply(message, now_s)
            if request is not None:
                self._endpoint.send(source, request)

    def _lose(self, peer_id: str) -> None:
        for request_id, placed_at in self._placed_at.items():
            if placed_at == peer_id:
                self._answers[request_id].record.error = f"{peer_id} was lost"
                self._answers[request_id].over.set()


def _take(answer: Answer, delta: TokenDelta, now_s: float) -> None:
    record = answer.record
    if delta.token_ids:
        record.event_times_s.append(now_s)
        answer.token_ids += delta.token_ids
        answer.logprobs += [entry.logprob for entry in delta.logprobs or ()]
        record.num_output_tokens += len(delta.token_ids)
    if delta.error is not None:
        record.error = f"{delta.error.kind}: {delta.error.message}"
    if delta.finish_reason is not None:
        record.num_cached_tokens = delta.num_cached_tokens
        record.ended_s = now_s
        answer.is_finished = True
        answer.over.set()


def new_secret() -> bytes:
    """For the engines of one run."""
    return secrets.token_bytes(32)
