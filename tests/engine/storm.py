"""The world of the random tests: three engines that prefill for each other while everything goes wrong that can.

The ingress sends the requests of an engine that died or drains to another, with the tokens that they have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import msgspec
from hypothesis import strategies as st

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.protocols import EngineOutput
from atom_cluster.engine.sim_runner import SimulatedRunner
from atom_cluster.kv_cache.layout import PageGroup
from atom_cluster.messages.requests import CancelRequest, GrammarSpec
from atom_cluster.messages.transfer import (
    KvPublication,
    PrefillAccepted,
    PrefillFailed,
    PrefillOrder,
    TicketRelease,
    TicketRenew,
)
from atom_cluster.units import ceil_div
from tests.factories import (
    BLOCK_SIZE,
    TRANSFER,
    assert_clean,
    check_integrity,
    expected_tokens,
    make_engine,
    make_message,
    make_prompt,
    make_runner,
    states,
    window,
)
from tests.fakes import Answer, InterruptedRunner, Network, VirtualClock
from tests.structured.compilers import HeldCompiler
from tests.structured.vocabularies import END

NAMES = ("a", "b", "c")
MESSAGES = (PrefillOrder, PrefillAccepted, KvPublication, PrefillFailed, TicketRelease, TicketRenew)
DAMAGE = 0x5A5A
GRAMMARS = (
    GrammarSpec(kind="regex", text="[a-f]{4}"),
    GrammarSpec(kind="regex", text="[a-z]{9,}"),
    GrammarSpec(kind="choice", text='["yes", "no"]'),
)
"""Which end before `max_tokens`, behind it, or at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of all three engines."""

    num_blocks: int
    num_rows: int
    budget: int
    is_async: bool
    kv_bytes_per_s: float
    chunk: int
    policy: Literal["mixed", "prefill_first", "decode_only"] = "mixed"
    windows: tuple[int, ...] = ()
    has_states: bool = False
    page_share: float = 1.0
    """Pages of other groups, relative to what lets all rows run."""
    num_drafts: int = 0
    acceptance: float = 0.7
    max_itl_s: float | None = None
    num_heard_in_step: int = 0
    """Messages that arrive each time an engine looks up from waiting for a step."""

    @property
    def other_groups(self) -> tuple[PageGroup, ...]:
        groups = []
        for size in self.windows:
            fewest = ceil_div(size + 2 * self.num_drafts, BLOCK_SIZE) + 2
            groups.append(window(size, fewest + int(self.page_share * self.num_rows * fewest)))
        if self.has_states:
            fewest = self.num_drafts + 2
            groups.append(states(fewest + int(self.page_share * self.num_rows * fewest)))
        return tuple(groups)


SIZES = st.builds(
    Sizes,
    num_blocks=st.sampled_from((12, 16, 40)),
    num_rows=st.sampled_from((1, 3, 8)),
    budget=st.sampled_from((6, 16, 64)),
    is_async=st.booleans(),
    kv_bytes_per_s=st.sampled_from((1e7, 1e8, 1e11)),
    chunk=st.sampled_from((0, 0, 5)),
    policy=st.sampled_from(("mixed", "mixed", "prefill_first", "decode_only")),
    windows=st.sampled_from(((), (), (5,), (1, 11))),
    has_states=st.booleans(),
    page_share=st.sampled_from((0.0, 0.3, 1.0, 2.0)),
    num_drafts=st.sampled_from((0, 0, 1, 2, 3)),
    acceptance=st.sampled_from((0.0, 0.7, 1.0)),
    max_itl_s=st.sampled_from((None, None, 0.005, 0.00515, 0.1)),
    num_heard_in_step=st.integers(0, 2),
)

_who = st.sampled_from(NAMES)
_send = st.tuples(
    st.just("send"),
    _who,
    st.sampled_from((None, *NAMES)),  # who prefills
    st.integers(0, 2),  # prompts of one family share a prefix
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(0, 1),  # priority
    st.sampled_from((None, None, *GRAMMARS)),
)
ACTION = st.one_of(
    _send,
    _send,
    st.tuples(st.just("follow"), _who, st.sampled_from((None, *NAMES)), st.integers(0, 60), st.integers(1, 12)),
    st.tuples(st.just("step"), _who),
    st.tuples(st.just("step"), _who),
    st.tuples(st.just("deliver"), st.integers(1, 4)),
    st.tuples(st.just("deliver"), st.integers(1, 4)),
    st.tuples(st.just("turns"), st.integers(1, 5)),
    st.tuples(st.just("compile"), _who, st.integers(1, 3)),
    st.tuples(st.just("cancel"), st.integers(0, 60)),
    st.tuples(st.just("lapse"), st.sampled_from((0.01, 0.3, 1.1, 2.1))),
    st.tuples(st.just("lose"), st.sampled_from(MESSAGES)),
    st.tuples(st.just("damage"), st.integers(0, 7)),
    st.tuples(st.just("disconnect"), _who, _who),
    st.tuples(st.just("restart"), _who, st.booleans()),
    st.tuples(st.just("drain"), _who, st.sampled_from((0.0, 0.05, 1.0))),
)
Action = tuple[str, ...]


@dataclass
class _Sent:
    engine: str
    prompt: tuple[int, ...]
    max_tokens: int
    grammar: GrammarSpec | None
    wire_id: str
    """Of its newest placement."""
    is_cancelled: bool = False


@dataclass
class Storm:
    """Carries out actions. `check` lets the storm pass and looks at what is left."""

    sizes: Sizes
    seed: int = 0
    network: Network = field(init=False)
    runners: dict[str, SimulatedRunner] = field(default_factory=dict)
    compilers: dict[str, HeldCompiler] = field(default_factory=dict)
    sent: dict[str, _Sent] = field(default_factory=dict)
    num_epochs: int = 0
    to_lose: list[type[EngineOutput]] = field(default_factory=list)
    to_damage: list[int] = field(default_factory=list)
    draining: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.network = Network(VirtualClock(), self.seed)
        self.network.alter = self._alter
        self.network.after_step = self._check_integrity
        for name in NAMES:
            self._start(name)

    def act(self, action: str, *values: object) -> None:
        getattr(self, f"_do_{action}")(*values)
        self._place_moved()

    def _start(self, name: str) -> None:
        sizes = self.sizes
        self.num_epochs += 1
        self.compilers[name] = HeldCompiler()
        runner = make_runner(
            self.network.clock,
            grammars=self.compilers[name],
            num_blocks=sizes.num_blocks,
            num_rows=sizes.num_rows,
            kv_bytes_per_s=sizes.kv_bytes_per_s,
            other_groups=sizes.other_groups,
            max_drafts=sizes.num_drafts,
            draft_acceptance=sizes.acceptance,
        )
        scheduler = SchedulerConfig(
            max_num_batched_tokens=sizes.budget,
            async_scheduling=sizes.is_async,
            long_prefill_tokens=sizes.chunk,
            policy=sizes.policy,
            max_itl_s=sizes.max_itl_s,
        )
        self.runners[name] = runner
        interrupted = InterruptedRunner(runner, during_step=lambda: self.network.deliver(sizes.num_heard_in_step))
        make_engine(
            self.network, name, runner=interrupted, scheduler=scheduler, transfer=TRANSFER, epoch=self.num_epochs
        )

    def _alter(self, source: str, target: str, message: EngineOutput) -> EngineOutput | None:
        if type(message) in self.to_lose:
            self.to_lose.remove(type(message))
            return None
        if isinstance(message, KvPublication) and message.block_ids and self.to_damage:
            index = self.to_damage.pop() % len(message.block_ids)
            tags = list(message.tags[0])
            tags[index] ^= DAMAGE
            return msgspec.structs.replace(message, tags=(tuple(tags),))
        return message

    def _check_integrity(self) -> None:
        for engine in self.network.engines.values():
            check_integrity(engine)

    # --- actions

    def _do_send(
        self,
        name: str,
        prefill: str | None,
        family: int,
        num_tokens: int,
        max_tokens: int,
        priority: int,
        grammar: GrammarSpec | None,
    ) -> None:
        prompt = (*make_prompt(num_tokens, seed=family), len(self.sent) % 3)
        self._send(name, prefill, prompt, max_tokens, priority, grammar)

    def _do_follow(self, name: str, prefill: str | None, number: int, max_tokens: int) -> None:
        """The next turn of a chat: an earlier prompt with its answer so far, and something new."""
        sent = self.sent.get(f"r{number}")
        answer = None if sent is None else self.network.answers.get(sent.wire_id)
        if sent is not None and answer is not None:
            self._send(name, prefill, (*sent.prompt, *answer.tokens)[:30] + (7,), max_tokens, 0, None)

    def _send(
        self,
        name: str,
        prefill: str | None,
        prompt: tuple[int, ...],
        max_tokens: int,
        priority: int,
        grammar: GrammarSpec | None,
    ) -> None:
        request_id = f"r{len(self.sent)}"
        self.sent[request_id] = _Sent(name, prompt, max_tokens, grammar, request_id)
        address = None if prefill is None or prefill == name else self.network.addresses[prefill]
        message = make_message(
            request_id, prompt, max_tokens, prefill=address, priority=priority, grammar=grammar, eos=_ends(grammar)
        )
        self.network.engines[name].put("client", message)

    def _do_compile(self, name: str, num_grammars: int) -> None:
        self.compilers[name].finish(num_grammars)

    def _do_step(self, name: str) -> None:
        self.network.step(name)

    def _do_deliver(self, num_messages: int) -> None:
        self.network.deliver(num_messages)

    def _do_turns(self, num_turns: int) -> None:
        for _ in range(num_turns):
            self.network.turn()

    def _do_cancel(self, number: int) -> None:
        sent = self.sent.get(f"r{number}")
        if sent is not None:
            sent.is_cancelled = True
            self.network.engines[sent.engine].put("client", CancelRequest(sent.wire_id))

    def _do_lapse(self, seconds: float) -> None:
        self.network.clock.sleep(seconds)

    def _do_lose(self, kind: type[EngineOutput]) -> None:
        self.to_lose.append(kind)

    def _do_damage(self, index: int) -> None:
        self.to_damage.append(index)

    def _do_disconnect(self, name: str, other: str) -> None:
        if name != other:
            self.network.disconnect(name, other)

    def _do_restart(self, name: str, is_noticed: bool) -> None:
        """Its requests are gone with it. The ingress places them again."""
        self.network.remove(name)
        self.draining.discard(name)
        self.runners[name].close()
        self._start(name)
        for number, sent in enumerate(self.sent.values()):
            if sent.engine == name and not sent.is_cancelled:
                self._place_again(sent, number)
        for other in self.network.engines:
            if is_noticed and other != name:
                self.network.engines[other].drop_peer(name)

    def _do_drain(self, name: str, timeout_s: float) -> None:
        """It is to stop, unless nobody would be left. It is there until it is restarted, and takes nothing new."""
        if len(self.draining | {name}) < len(NAMES):
            self.draining.add(name)
            self.network.engines[name].begin_drain(timeout_s)

    def _place_moved(self) -> bool:
        """Place what draining engines have given up, or would not take; whether there was anything."""
        moved = [
            (number, sent)
            for number, sent in enumerate(self.sent.values())
            if not sent.is_cancelled and self.network.answers.get(sent.wire_id, Answer()).error_kind == "NotReady"
        ]
        for number, sent in moved:
            self._place_again(sent, number)
        return bool(moved)

    def _place_again(self, sent: _Sent, number: int) -> None:
        answer = self.network.answers.get(sent.wire_id, Answer())
        if answer.final is not None and answer.error_kind != "NotReady":
            return
        sent.wire_id += "+"
        self.network.answers[sent.wire_id] = Answer(tokens=list(answer.tokens))
        ready = [name for name in NAMES if name not in self.draining]
        sent.engine, prefill = ready[number % len(ready)], NAMES[number % 2]
        address = None if prefill == sent.engine else self.network.addresses[prefill]
        message = make_message(
            sent.wire_id,
            sent.prompt,
            sent.max_tokens,
            prefill=address,
            grammar=sent.grammar,
            eos=_ends(sent.grammar),
        )
        emitted = tuple(answer.tokens)
        self.network.engines[sent.engine].put("client", msgspec.structs.replace(message, emitted=emitted))

    # --- the end

    def check(self) -> None:
        self.to_lose.clear()
        for compiler in self.compilers.values():
            compiler.open()
        self.network.settle()
        while self._place_moved():
            self.network.settle()
        for request_id, sent in self.sent.items():
            answer = self.network.answers.get(sent.wire_id)
            expected = _expected(sent.prompt, sent.max_tokens, sent.grammar)
            tokens = [] if answer is None else answer.tokens
            assert tokens == expected[: len(tokens)], f"{request_id} went wrong"
            if not sent.is_cancelled:
                reason = "stop" if expected[-1] == END and sent.grammar is not None else "length"
                assert answer is not None and answer.reason == reason, f"{request_id} was lost: {answer}"
                assert len(tokens) == len(expected)
        for engine in self.network.engines.values():
            assert_clean(engine)


def _ends(grammar: GrammarSpec | None) -> tuple[int, ...]:
    """End tokens: without a grammar there are none, so that `max_tokens` decides."""
    return () if grammar is None else (END,)


@cache
def _expected(prompt: tuple[int, ...], max_tokens: int, grammar: GrammarSpec | None) -> list[int]:
    """What an engine says that has nothing else to do."""
    if grammar is None:
        return expected_tokens(prompt, max_tokens)
    network = Network(VirtualClock())
    engine = make_engine(network, runner=make_runner(network.clock, grammars=HeldCompiler(is_open=True)))
    engine.put("client", make_message("r", prompt, max_tokens, grammar=grammar, eos=_ends(grammar)))
    network.settle()
    return network.answers["r"].tokens
