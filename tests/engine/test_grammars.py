"""Nobody waits for somebody else's grammar, whatever becomes of it and of who wants it; and it changes no token."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from atom_cluster.config.scheduler import SchedulerConfig
from atom_cluster.engine.core import EngineCore
from atom_cluster.messages.cluster import PeerAddress
from atom_cluster.messages.grammars import ForgetGrammar
from atom_cluster.messages.requests import CancelRequest, GrammarSpec
from atom_cluster.observability.memory import MemoryMetrics
from atom_cluster.observability.metrics import GRAMMAR_WAIT_S, PREEMPTIONS, REQUESTS_WAITING
from tests.factories import (
    assert_clean,
    check_integrity,
    expected_tokens,
    make_engine,
    make_message,
    make_prompt,
    make_runner,
)
from tests.fakes import Answer, Network, RecordingRunner, VirtualClock
from tests.structured.compilers import HeldCompiler
from tests.structured.vocabularies import END

CLIENT = "ingress"
WORD = GrammarSpec(kind="regex", text="[a-f]{6}-[0-9]{9}")
OTHER = GrammarSpec(kind="regex", text="[p-z]{5}")
WRONG = GrammarSpec(kind="regex", text="(")


class World:
    """Engines whose compilers do nothing before they are told to, and who asks them."""

    def __init__(self) -> None:
        self.network = Network(VirtualClock())
        self.network.after_step = self.check_integrity
        self.compilers: dict[str, HeldCompiler] = {}
        self.runners: dict[str, RecordingRunner] = {}
        self.metrics: dict[str, MemoryMetrics] = {}

    def check_integrity(self) -> None:
        for engine in self.network.engines.values():
            check_integrity(engine)

    def start(
        self, name: str = "engine", *, scheduler: SchedulerConfig | None = None, is_open: bool = False, **sizes: int
    ) -> EngineCore:
        compiler = self.compilers[name] = HeldCompiler(is_open=is_open)
        device = make_runner(self.network.clock, grammars=compiler, **sizes)  # type: ignore[arg-type]
        runner = self.runners[name] = RecordingRunner(device)
        metrics = self.metrics[name] = MemoryMetrics()
        epoch = len(self.compilers)
        return make_engine(self.network, name, runner=runner, scheduler=scheduler, metrics=metrics, epoch=epoch)

    def ask(
        self,
        request_id: str,
        grammar: GrammarSpec | None = None,
        *,
        seed: int = 0,
        num_tokens: int = 10,
        name: str = "engine",
        prefill: PeerAddress | None = None,
        deadline_s: float | None = None,
        priority: int = 0,
    ) -> None:
        message = make_message(
            request_id,
            make_prompt(num_tokens, seed),
            20,
            eos=(END,),
            grammar=grammar,
            prefill=prefill,
            deadline_s=deadline_s,
            priority=priority,
        )
        self.network.engines[name].put(CLIENT, message)

    def answer(self, request_id: str) -> Answer:
        return self.network.answers.setdefault(request_id, Answer())

    def turns_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(500):
            if condition():
                return
            self.network.turn()
        raise AssertionError("it did not happen")

    def turns_until_answered(self, *request_ids: str) -> None:
        self.turns_until(lambda: all(self.answer(request_id).final for request_id in request_ids))

    def turns(self, num_turns: int = 20) -> None:
        for _ in range(num_turns):
            self.network.turn()

    def settle(self) -> None:
        for compiler in self.compilers.values():
            compiler.open()
        self.network.settle()
        for engine in self.network.engines.values():
            assert_clean(engine)


@cache
def expected(grammar: GrammarSpec, seed: int = 0, num_tokens: int = 10) -> list[int]:
    """What an engine says that has compiled it before, and nothing else to do."""
    world = World()
    world.start(is_open=True)
    world.ask("before", grammar, seed=99)
    world.settle()
    world.ask("r", grammar, seed=seed, num_tokens=num_tokens)
    world.settle()
    assert world.metrics["engine"].histogram(GRAMMAR_WAIT_S).count <= 1
    assert world.answer("r").reason == "stop"
    return world.answer("r").tokens


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_others_are_answered_while_a_grammar_is_compiled(world: World, is_async: bool, num_drafts: int) -> None:
    world.start(scheduler=SchedulerConfig(async_scheduling=is_async), num_rows=2, max_drafts=num_drafts)
    world.ask("word", WORD)
    world.ask("same", WORD, seed=1)
    for number in range(4):
        world.ask(f"free {number}", seed=number)
    world.turns_until_answered(*(f"free {number}" for number in range(4)))
    assert world.answer("word").tokens == world.answer("same").tokens == []
    world.turns(3)
    assert world.metrics["engine"].value(REQUESTS_WAITING, reason="grammar") == 2
    world.settle()
    for number in range(4):
        assert world.answer(f"free {number}").tokens == expected_tokens(make_prompt(10, number), 20)
    assert world.answer("word").tokens == expected(WORD)
    assert world.answer("same").tokens == expected(WORD, 1)
    assert world.compilers["engine"].num_submitted == 1
    assert world.metrics["engine"].histogram(GRAMMAR_WAIT_S).count == 2


def test_who_waits_for_one_grammar_does_not_wait_for_another(world: World) -> None:
    world.start()
    world.ask("word", WORD)
    world.ask("other", OTHER)
    world.turns()
    world.compilers["engine"].finish(1)
    world.turns_until_answered("word")
    assert not world.answer("other").tokens
    world.settle()
    assert world.answer("other").tokens == expected(OTHER)


def test_a_long_prompt_is_computed_meanwhile_but_for_its_last_chunk(world: World) -> None:
    world.start(scheduler=SchedulerConfig(max_num_batched_tokens=8))
    world.ask("word", WORD, num_tokens=30)
    world.turns()
    steps = [row for plan in world.runners["engine"].plans for row in plan.rows]
    assert [(row.start, row.num_tokens) for row in steps] == [(0, 8), (8, 8), (16, 8)]
    world.settle()
    assert world.answer("word").tokens == expected(WORD, 0, 30)


def test_a_prompt_that_must_come_whole_waits_whole(world: World) -> None:
    world.start(scheduler=SchedulerConfig(chunked_prefill=False, max_num_batched_tokens=96))
    world.ask("word", WORD, num_tokens=30)
    world.turns()
    assert not any(plan.rows for plan in world.runners["engine"].plans)
    world.settle()
    assert world.answer("word").tokens == expected(WORD, 0, 30)


@pytest.mark.parametrize("num_turns", range(5))
@pytest.mark.parametrize("budget", [4, 64])
@pytest.mark.parametrize("how", ["cancel", "client", "deadline"])
def test_a_request_that_ends_while_its_grammar_is_compiled_leaves_nothing(
    world: World, num_turns: int, budget: int, how: str
) -> None:
    engine = world.start(scheduler=SchedulerConfig(max_num_batched_tokens=budget))
    world.ask("word", WORD, deadline_s=1.0 if how == "deadline" else None)
    world.ask("free", seed=3)
    world.turns(num_turns)
    if how == "cancel":
        engine.put(CLIENT, CancelRequest("word"))
    elif how == "client":
        engine.drop_peer(CLIENT)
    else:
        world.network.clock.sleep(2.0)
    world.turns(40)
    assert_clean(engine)
    assert world.answer("word").error_kind == ("RequestTimeout" if how == "deadline" else None)
    assert not world.answer("word").tokens
    assert how == "client" or world.answer("free").tokens == expected_tokens(make_prompt(10, 3), 20)
    assert not any(grammar.users for grammar in engine._grammars._known.values())
    world.ask("again", WORD)
    world.settle()
    assert world.answer("again").tokens == expected(WORD)
    assert world.compilers["engine"].num_submitted == 1


def test_a_grammar_that_cannot_be_compiled_ends_its_requests_alone(world: World) -> None:
    world.start()
    for request_id, grammar in (("wrong", WRONG), ("word", WORD), ("also wrong", WRONG), ("free", None)):
        world.ask(request_id, grammar)
    world.turns(3)
    world.compilers["engine"].finish(1)
    world.turns_until_answered("wrong", "also wrong")
    for request_id in ("wrong", "also wrong"):
        final = world.answer(request_id).final
        assert final is not None and final.error is not None
        assert (final.token_ids, final.error.kind) == ((), "RequestFailed")
        assert final.error.message.startswith("the output cannot be given the structure that was asked for: the gramma")
    assert not world.answer("word").tokens
    world.settle()
    assert world.answer("word").tokens == expected(WORD)
    assert world.answer("free").tokens == expected_tokens(make_prompt(10), 20)
    commands = [command for plan in world.runners["engine"].plans for command in plan.grammars]
    assert ForgetGrammar(grammar_id=0) in commands


def test_who_waits_for_a_grammar_can_be_preempted_and_comes_back(world: World) -> None:
    world.start(num_blocks=13, scheduler=SchedulerConfig(max_num_batched_tokens=8))
    world.ask("word", WORD, num_tokens=26, seed=5, priority=1)
    world.turns(4)
    assert world.network.engines["engine"].stats().num_running == 1
    for number in range(2):
        world.ask(f"free {number}", seed=number)
    world.turns_until_answered("free 0", "free 1")
    assert world.metrics["engine"].value(PREEMPTIONS) > 0
    world.settle()
    assert world.answer("word").tokens == expected(WORD, 5, 26)


# --- with prefill and decode apart


def split(world: World, *, prefill_is_open: bool, decode_is_open: bool) -> PeerAddress:
    world.start("prefill", is_open=prefill_is_open)
    world.start("decode", is_open=decode_is_open)
    return world.network.addresses["prefill"]


def test_prefill_computes_other_prompts_while_it_compiles(world: World) -> None:
    prefill = split(world, prefill_is_open=False, decode_is_open=True)
    world.ask("word", WORD, name="decode", prefill=prefill)
    world.ask("free", seed=1, name="decode", prefill=prefill)
    world.turns_until_answered("free")
    assert not world.answer("word").tokens
    world.settle()
    assert world.answer("word").tokens == expected(WORD)


def test_decode_goes_on_with_others_while_it_compiles_and_the_first_token_is_out(world: World) -> None:
    prefill = split(world, prefill_is_open=True, decode_is_open=False)
    world.ask("word", WORD, name="decode", prefill=prefill)
    world.ask("free", seed=1, name="decode", prefill=prefill)
    world.turns_until_answered("free")
    assert world.answer("word").tokens == expected(WORD)[:1]
    world.settle()
    assert world.answer("word").tokens == expected(WORD)
    assert not any(row.num_tokens > 1 for plan in world.runners["decode"].plans for row in plan.rows)


@pytest.mark.parametrize("cancels_at", ["prefill", "decode"])
def test_a_cancelled_handoff_leaves_nothing_on_either_side(world: World, cancels_at: str) -> None:
    prefill = split(world, prefill_is_open=cancels_at == "decode", decode_is_open=False)
    world.ask("word", WORD, name="decode", prefill=prefill)
    world.turns()
    world.network.engines["decode"].put(CLIENT, CancelRequest("word"))
    world.turns()
    for engine in world.network.engines.values():
        assert_clean(engine)
        assert not any(grammar.users for grammar in engine._grammars._known.values())
    world.settle()


def test_a_prefill_engine_that_cannot_compile_gives_the_prompt_back(world: World) -> None:
    prefill = split(world, prefill_is_open=True, decode_is_open=True)
    world.compilers["prefill"].close()
    runner = make_runner(world.network.clock)
    make_engine(world.network, "prefill", runner=runner, epoch=prefill.epoch)
    world.ask("word", WORD, name="decode", prefill=prefill)
    world.settle()
    assert world.answer("word").tokens == expected(WORD)
