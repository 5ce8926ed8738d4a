"""Stand-ins for what surrounds an engine: time, clients, the network, and runners with a defect. No real waiting."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.protocols import ROUTER, EngineInput, EngineOutput, RunnerInfo, StepRunner
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.requests import TokenBatch, TokenDelta
from atom_cluster.messages.steps import StepPlan, StepResult
from atom_cluster.messages.transfer import Report


@dataclass
class VirtualClock:
    """Time that passes only when somebody waits, as a simulated runner does for its steps."""

    at_s: float = 0.0

    def now_s(self) -> float:
        return self.at_s

    def sleep(self, seconds: float) -> None:
        self.at_s += seconds

    def __call__(self) -> float:
        return self.at_s


class ListOutbox:
    """Keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str | PeerAddress, EngineOutput]] = []

    def send(self, destination: str | PeerAddress, message: EngineOutput) -> None:
        self.sent.append((destination, message))


@dataclass
class Answer:
    """One request's answer so far. Checks that its deltas join up and that nothing follows the last one."""

    tokens: list[int] = field(default_factory=list)
    final: TokenDelta | None = None

    def take(self, delta: TokenDelta) -> None:
        assert self.final is None, f"{delta} follows the end"
        assert delta.first_index == len(self.tokens), f"{delta} follows {len(self.tokens)} tokens"
        assert delta.token_ids or delta.finish_reason, f"{delta} says nothing"
        self.tokens.extend(delta.token_ids)
        if delta.finish_reason is not None:
            self.final = delta

    @property
    def reason(self) -> str | None:
        return None if self.final is None else self.final.finish_reason

    @property
    def error_kind(self) -> str | None:
        return None if self.final is None or self.final.error is None else self.final.error.kind


Pair = tuple[str, str]


class Network:
    """Engines, clients and the messages between them: in order between any two, in any order otherwise."""

    def __init__(self, clock: VirtualClock, seed: int = 0) -> None:
        self.clock = clock
        self.random = random.Random(seed)
        self.engines: dict[str, EngineCore] = {}
        self.addresses: dict[str, PeerAddress] = {}
        self.answers: dict[str, Answer] = {}
        """By request id."""
        self.to_router: list[EngineOutput] = []
        self.carried: list[tuple[str, str, EngineOutput]] = []
        """Messages between engines, as delivered."""
        self.alter: Callable[[str, str, EngineOutput], EngineOutput | None] = lambda source, target, message: message
        """What becomes of a message between engines; None loses it."""
        self.after_step: Callable[[], None] = lambda: None
        self._queues: dict[Pair, deque[EngineOutput]] = {}

    def outbox(self, peer_id: str) -> _Outbox:
        return _Outbox(self, peer_id)

    def add(self, address: PeerAddress, engine: EngineCore) -> None:
        """An engine joins, in place of an earlier one of its name."""
        self.engines[address.peer_id] = engine
        self.addresses[address.peer_id] = address

    def remove(self, peer_id: str) -> None:
        """An engine dies; nobody is told here."""
        del self.engines[peer_id], self.addresses[peer_id]
        self.cut(peer_id)

    def cut(self, peer_id: str, other: str | None = None) -> None:
        """Lose what is on its way from and to an engine, or only between two."""
        for pair, queue in self._queues.items():
            if peer_id in pair and (other is None or other in pair):
                queue.clear()

    def disconnect(self, peer_id: str, other: str) -> None:
        """Two engines lose each other, and notice."""
        self.cut(peer_id, other)
        for here, there in ((peer_id, other), (other, peer_id)):
            if here in self.engines:
                self.engines[here].drop_peer(there)

    def post(self, source: str, destination: str | PeerAddress, message: EngineOutput) -> None:
        if isinstance(message, TokenBatch):
            for delta in message.deltas:
                self.answers.setdefault(delta.request_id, Answer()).take(delta)
        elif destination == ROUTER:
            self.to_router.append(message)
        else:
            target = destination.peer_id if isinstance(destination, PeerAddress) else destination
            is_known = target in self.engines and destination in (target, self.addresses[target])
            altered = self.alter(source, target, message) if is_known else None
            if altered is not None:
                self._queues.setdefault((source, target), deque()).append(altered)

    def deliver(self, num_messages: int = 1_000_000) -> int:
        """Deliver up to so many messages, from pairs chosen at random; how many there were."""
        for count in range(num_messages):
            pairs = [pair for pair, queue in self._queues.items() if queue]
            if not pairs:
                return count
            source, target = self.random.choice(pairs)
            message = self._queues[source, target].popleft()
            if target in self.engines:
                self.carried.append((source, target, message))
                self.engines[target].put(source, _as_input(message))
        return num_messages

    def messages(self, kind: type[EngineOutput]) -> list[EngineOutput]:
        """Delivered messages of one kind."""
        return [message for _, _, message in self.carried if isinstance(message, kind)]

    def step(self, peer_id: str) -> None:
        self.engines[peer_id].step()
        self.after_step()

    def turn(self) -> None:
        """Every engine takes a turn and every message arrives; time passes if nothing else happens."""
        before_s = self.clock.at_s
        for peer_id in list(self.engines):
            self.step(peer_id)
        if not self.deliver() and self.clock.at_s == before_s:
            self.clock.at_s += 0.05

    def settle(self, max_turns: int = 3000) -> None:
        """Turns until no engine has anything left to do."""
        for _ in range(max_turns):
            self.turn()
            if not any(self._is_busy(peer_id) for peer_id in self.engines) and not any(self._queues.values()):
                return
        raise AssertionError(f"still busy: { {name: engine.stats() for name, engine in self.engines.items()} }")

    def _is_busy(self, peer_id: str) -> bool:
        is_busy = self.engines[peer_id].step()
        self.after_step()
        return is_busy


@dataclass(frozen=True)
class _Outbox:
    network: Network
    peer_id: str

    def send(self, destination: str | PeerAddress, message: EngineOutput) -> None:
        self.network.post(self.peer_id, destination, message)


def _as_input(message: EngineOutput) -> EngineInput:
    """Through the wire format and back, as between processes."""
    decoded: EngineInput = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=EngineInput)
    return decoded


class RecordingRunner:
    """Passes everything on, and keeps the plans. With `samples_eos`, end-of-sequence tokens are as likely as others."""

    def __init__(self, inner: StepRunner, *, samples_eos: bool = False) -> None:
        self._inner = inner
        self._samples_eos = samples_eos
        self.plans: list[StepPlan] = []

    @property
    def info(self) -> RunnerInfo:
        return self._inner.info

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        if self._samples_eos:
            new_rows = tuple(msgspec.structs.replace(row, eos_token_ids=()) for row in plan.new_rows)
            plan = msgspec.structs.replace(plan, new_rows=new_rows)
        self._inner.submit(plan)

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        return self._inner.collect(timeout_s)

    def poll_kv(self) -> Sequence[Report]:
        return self._inner.poll_kv()

    def close(self) -> None:
        self._inner.close()


class InterruptedRunner(RecordingRunner):
    """Something happens whenever its engine looks up from waiting for a step."""

    def __init__(self, inner: StepRunner, *, during_step: Callable[[], object]) -> None:
        super().__init__(inner)
        self.during_step = during_step

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        result = super().collect(timeout_s)
        if result is None:
            self.during_step()
        return result


class FailingRunner(RecordingRunner):
    """Loses its device when a given step is collected."""

    def __init__(self, inner: StepRunner, *, fails_at: int) -> None:
        super().__init__(inner)
        self._fails_at = fails_at

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        result = super().collect(timeout_s)
        if result is not None and result.step_id >= self._fails_at:
            raise RuntimeError("the device is gone")
        return result
