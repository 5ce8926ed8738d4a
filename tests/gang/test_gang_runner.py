"""GangRunner and Follower together, over a real channel, with ranks that have no model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from atom_cluster.engine.core import EngineCore
from atom_cluster.engine.local_runner import LocalRunner, merge_rank_infos
from atom_cluster.errors import AtomClusterError, GangError
from atom_cluster.gang import wire
from atom_cluster.gang.follower import Follower
from atom_cluster.gang.gang_runner import GangRunner
from atom_cluster.gang.plan_channel import PlanReceiver
from atom_cluster.gang.step_clock import StepClock
from atom_cluster.messages.grammars import CompileGrammar, GrammarReady
from atom_cluster.messages.profile import OpenWindow, WindowWritten
from atom_cluster.messages.requests import GrammarSpec, SamplingParams
from atom_cluster.messages.steps import NewRow, RowStep, SampledTokens, StepPlan
from atom_cluster.messages.transfer import BlocksTagged, KvPlacement, ReadBlocks, ReadFinished, Report, TagBlocks
from atom_cluster.runner.model_runner import ModelRunner
from atom_cluster.structured.held import HeldGrammars
from tests.factories import assert_clean, make_engine, make_message
from tests.fakes import Network, VirtualClock
from tests.gang import channels
from tests.gang.fake_ranks import FakeRank
from tests.structured.compilers import HeldCompiler


class Rig:
    """A gang in one process: rank 0's runner, and a thread per follower as in `Worker`."""

    def __init__(self, *, num_followers: int, behaviour: str) -> None:
        world_size = num_followers + 1
        self.ranks = [FakeRank(rank=rank, world_size=world_size, behaviour=behaviour) for rank in range(world_size)]
        sender, self.receivers = channels.open_channel("shm", num_followers)
        self.runner = GangRunner(
            info=merge_rank_infos([rank.info for rank in self.ranks]),
            local=LocalRunner(cast("ModelRunner", self.ranks[0])),
            poll_local_kv=self.ranks[0].poll_kv,
            sender=sender,
        )
        self.threads = [
            threading.Thread(target=self._follow, args=(rank, receiver), daemon=True)
            for rank, receiver in zip(self.ranks[1:], self.receivers)
        ]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        for rank in self.ranks:
            rank.release.set()
        self.runner.close()
        for thread, receiver in zip(self.threads, self.receivers):
            thread.join(5)
            receiver.close()

    def _follow(self, rank: FakeRank, receiver: PlanReceiver) -> None:
        try:
            Follower(rank, receiver, StepClock()).run()
        except AtomClusterError as exc:
            with contextlib.suppress(GangError):  # rank 0 may have hung up
                receiver.report(wire.encode(wire.RankFailed(str(exc))))


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(num_followers: int = 2, behaviour: str = "ok") -> Rig:
        rigs.append(Rig(num_followers=num_followers, behaviour=behaviour))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


WORD = GrammarSpec(kind="regex", text="[a-f]{4}")
PLAN = StepPlan(
    step_id=0,
    new_rows=(
        NewRow(
            row=2,
            request_id="r",
            token_ids=(1, 2, 3),
            num_prompt_tokens=3,
            pages=((5,),),
            sampling=SamplingParams(seed=1, stop_token_ids=(9,)),
        ),
    ),
    rows=(RowStep(2, 0, 3, True),),
)


def poll_until(runner: GangRunner, count: int) -> list[Report]:
    deadline_s = time.monotonic() + 10
    reports: list[Report] = []
    while len(reports) < count and time.monotonic() < deadline_s:
        reports += runner.poll_kv()
    return reports


def turn_until(engine: EngineCore, condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        engine.step()


def test_every_rank_executes_the_same_plans_and_rank_0_answers(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.runner.submit(PLAN)
    rig.runner.submit(StepPlan(step_id=1))
    first, second = rig.runner.collect(), rig.runner.collect()
    assert first is not None and second is not None
    assert first.sampled == (SampledTokens(2, (102,)),)
    assert (first.step_id, second.step_id) == (0, 1)
    rig.runner.close()
    for thread in rig.threads:
        thread.join(5)
    assert [rank.plans for rank in rig.ranks] == [[PLAN, StepPlan(step_id=1)]] * 3


def test_collect_gives_none_when_nothing_is_ready(make_rig: Callable[..., Rig]) -> None:
    assert make_rig().runner.collect(0.0) is None


def test_the_gang_offers_the_memory_of_all_ranks(make_rig: Callable[..., Rig]) -> None:
    info = make_rig().runner.info
    assert info.world_size == 3
    assert info.kv_offers[0].descriptors == (b"rank 0", b"rank 1", b"rank 2")


def test_a_profiler_window_is_opened_on_every_rank_and_its_traces_come_together(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    command = OpenWindow(window_id=3, replica="d", time="t", num_steps=None, with_stack=None, record_shapes=None)
    rig.runner.submit(StepPlan(step_id=0, profile=command))
    assert rig.runner.collect(10.0) is not None
    assert poll_until(rig.runner, 1) == [WindowWritten(window_id=3, files=("rank 0", "rank 1", "rank 2"))]


def test_kv_reports_come_once_every_rank_has_reported(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    tag = TagBlocks(ticket_id="t", epoch=1, first_block=0, block_ids=(1, 2), reader=KvPlacement(4, 3))
    read = ReadBlocks(read_id=7, peer="p", epoch=1, remote_block_ids=(1,), local_block_ids=(1,), tags=(), timeout_s=1.0)
    rig.runner.submit(StepPlan(step_id=0, kv=(tag, read)))
    assert rig.runner.collect(10.0) is not None
    assert poll_until(rig.runner, 2) == [
        BlocksTagged(ticket_id="t", first_block=0, tags=((1, 2), (11, 12), (21, 22))),
        ReadFinished(read_id=7, num_bytes=15),
    ]


def test_a_grammar_is_ready_once_every_rank_has_compiled_it_and_nobody_waits_meanwhile(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(num_followers=1)
    compilers = [HeldCompiler() for _ in rig.ranks]
    for rank, compiler in zip(rig.ranks, compilers):
        rank.grammars = HeldGrammars(compiler)
    network = Network(VirtualClock())
    engine = make_engine(network, runner=rig.runner)
    engine.put("c", make_message("word", (1, 2, 3), 3, grammar=WORD, eos=(255,)))
    engine.put("c", make_message("free", (4, 5, 6), 3))
    turn_until(engine, lambda: all(compiler.num_submitted == 1 for compiler in compilers))
    compilers[0].finish()
    turn_until(engine, lambda: "free" in network.answers and network.answers["free"].reason == "length")
    turn_until(engine, lambda: rig.ranks[1].plans == rig.ranks[0].plans)
    assert "word" not in network.answers
    compilers[1].finish()
    turn_until(engine, lambda: "word" in network.answers and network.answers["word"].reason == "length")
    assert_clean(engine)


def test_a_grammar_that_one_rank_cannot_compile_is_not_ready(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(num_followers=1)
    rig.ranks[0].grammars = HeldGrammars(HeldCompiler(is_open=True))
    rig.runner.submit(StepPlan(step_id=0, grammars=(CompileGrammar(grammar_id=5, spec=WORD),)))
    assert rig.runner.collect(10.0) is not None
    assert poll_until(rig.runner, 1) == [GrammarReady(grammar_id=5, error="this runner has no vocabulary")]


def test_a_failing_follower_fails_the_gang_with_its_own_words(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(behaviour="fail_step:1")
    rig.runner.submit(PLAN)
    with pytest.raises(GangError, match="rank 1 failed: the device is on fire"):
        for _ in range(100):
            rig.runner.collect(0.1)
    with pytest.raises(GangError, match="failed before"):
        rig.runner.submit(PLAN)


def test_a_failing_follower_is_noticed_while_rank_0_waits_for_its_step(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(behaviour="hang_step:0")
    rig.runner.submit(PLAN)
    assert rig.ranks[0].is_stuck.wait(10)
    rig.receivers[1].close()
    with pytest.raises(GangError, match="rank 2 is gone"):
        rig.runner.collect(10.0)


def test_a_device_of_a_follower_that_fails_is_noticed_though_no_further_plan_comes(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(behaviour="fail_device:1")
    rig.runner.submit(PLAN)
    assert rig.runner.collect(10.0) is not None
    with pytest.raises(GangError, match="rank 1 failed: the device is on fire"):
        for _ in range(50):
            rig.runner.poll_kv()
            rig.runner.collect(0.1)


def test_an_error_of_rank_0_alone_is_raised_as_it_is(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(num_followers=1, behaviour="fail_step:0")
    rig.runner.submit(PLAN)
    with pytest.raises(AtomClusterError, match="the device is on fire"):
        rig.runner.collect(10.0)


def test_close_dismisses_the_followers(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    for _ in range(2):
        rig.runner.close()
    for thread in rig.threads:
        thread.join(5)
        assert not thread.is_alive()
    assert rig.ranks[0].num_closed == 1
    with pytest.raises(AtomClusterError, match="closed"):
        rig.runner.submit(PLAN)
