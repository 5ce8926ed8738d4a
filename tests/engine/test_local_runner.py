from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest
import torch

from atom_cluster.engine.local_runner import LocalRunner, merge_rank_infos
from atom_cluster.errors import AtomClusterError
from atom_cluster.kv_cache.page_map import opaque_page
from atom_cluster.kv_transfer.agent import PageFacts, open_agent
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.messages.transfer import (
    BlocksTagged,
    ConnectPeer,
    KvPlacement,
    KvReport,
    ReadBlocks,
    ReadFinished,
    TagBlocks,
)
from atom_cluster.runner.kv_memory import KvMemory
from atom_cluster.runner.model_runner import LaunchedStep, ModelRunner
from atom_cluster.runner.rank_info import RankInfo
from atom_cluster.units import Deadline
from tests.runner.context_model import GREEDY, ContextModel, continuation, make_memory, make_runner

PROMPT = (3, 1, 4, 1, 5)


def first_plan(tokens: tuple[int, ...] = PROMPT) -> StepPlan:
    new = NewRow(
        row=0, request_id="r", token_ids=tokens, num_prompt_tokens=len(tokens), pages=((3, 1, 2),), sampling=GREEDY
    )
    return StepPlan(step_id=0, new_rows=(new,), rows=(RowStep(0, 0, len(tokens), samples=True),))


def decode_plan(step_id: int) -> StepPlan:
    return StepPlan(step_id=step_id, rows=(RowStep(0, len(PROMPT) + step_id - 1, 1, samples=True),))


@pytest.fixture
def runner() -> Iterator[LocalRunner]:
    runner = LocalRunner(make_runner())
    yield runner
    runner.close()


def test_the_next_plan_can_be_submitted_before_the_tokens_of_the_last_one_are_known(runner: LocalRunner) -> None:
    runner.submit(first_plan())
    found = []
    for step_id in range(1, 5):
        runner.submit(decode_plan(step_id))
        result = runner.collect(timeout_s=30)
        assert result is not None
        assert result.step_id == step_id - 1
        found.append(result.sampled[0].token_ids[0])
    assert found == continuation(PROMPT, 4)


def test_collect_returns_none_when_nothing_is_ready_in_time(runner: LocalRunner) -> None:
    assert runner.collect(timeout_s=0.001) is None


def test_the_exception_of_a_step_is_raised_by_collect_and_ends_the_runner() -> None:
    runner = LocalRunner(make_runner(model=ContextModel(fail_on=96)))
    runner.submit(first_plan((1, 96)))
    runner.submit(decode_plan(1))
    with pytest.raises(RuntimeError, match="caught fire"):
        runner.collect(timeout_s=30)
    with pytest.raises(AtomClusterError, match="failed before"):
        runner.submit(decode_plan(2))
    runner.close()


class FailingDevice:
    """Issues nothing: its first step fails on the way to the device."""

    computes_alone = True

    def __init__(self) -> None:
        self.info = make_runner().info
        self.num_launched = 0

    def launch(self, plan: StepPlan) -> LaunchedStep:
        self.num_launched += 1
        raise RuntimeError(f"step {plan.step_id} fell off")

    def close(self) -> None:
        pass


def test_nothing_is_issued_behind_a_step_that_could_not_be() -> None:
    device = FailingDevice()
    runner = LocalRunner(cast("ModelRunner", device))
    runner.submit(first_plan())
    runner.submit(decode_plan(1))
    assert device.num_launched == 1
    with pytest.raises(RuntimeError, match="step 0 fell off"):
        runner.collect(timeout_s=30)
    runner.close()


def test_close_is_idempotent_and_ends_the_runner(runner: LocalRunner) -> None:
    runner.close()
    runner.close()
    with pytest.raises(AtomClusterError, match="closed"):
        runner.submit(first_plan())


def test_info_offers_the_transports_that_all_ranks_have() -> None:
    ranks = [
        RankInfo(
            num_blocks=9,
            block_size=4,
            max_num_requests=2,
            max_model_len=40,
            vocab_size=97,
            rank=rank,
            world_size=2,
            kv_descriptors={"shm": b"s%d" % rank, "tcp": b"t%d" % rank} if rank == 0 else {"tcp": b"t1"},
            fingerprint_fields={"config": "x"},
            choices={"dtype": f"rank {rank}"},
        )
        for rank in range(2)
    ]
    info = merge_rank_infos(ranks)
    assert (info.num_blocks, info.world_size, info.kv_transports) == (9, 2, ("tcp",))
    assert info.kv_offers[0].descriptors == (b"t0", b"t1")
    assert info.choices == {"dtype": "rank 0"}


def wait_for_report(runner: LocalRunner) -> KvReport:
    deadline = Deadline.after(30)
    while not deadline.has_passed:
        reports = runner.poll_kv()
        if reports:
            return reports[0]
        runner.collect(timeout_s=0.005)
    raise AssertionError("no report came")


def make_exchanging_runner() -> tuple[LocalRunner, KvMemory]:
    memory = make_memory()
    settings = TransportSettings(rank=0, host="127.0.0.1", secret=b"0123456789abcdef")
    pages = PageFacts(
        maps=tuple(opaque_page(region.block_bytes) for region in memory.regions), placement=KvPlacement(4, 1)
    )
    agent, _ = open_agent("auto", regions=memory.regions, pages=pages, settings=settings)
    return LocalRunner(make_runner(memory=memory, agent=agent)), memory


def test_blocks_of_a_step_can_be_tagged_and_read_by_later_plans() -> None:
    source, source_memory = make_exchanging_runner()
    target, target_memory = make_exchanging_runner()
    try:
        plan = first_plan()
        tag = TagBlocks(ticket_id="t", epoch=1, first_block=0, block_ids=(3, 1), reader=KvPlacement(4, 1))
        source.submit(plan)
        assert source.collect(20) is not None
        source.submit(StepPlan(step_id=1, kv=(tag,)))
        tagged = wait_for_report(source)
        assert isinstance(tagged, BlocksTagged)
        offer = source.info.kv_offers[0]
        connect = ConnectPeer(
            peer="p", transport=offer.transport, descriptors=offer.descriptors, placement=KvPlacement(4, 1)
        )
        read = ReadBlocks(
            read_id=1,
            peer="p",
            epoch=1,
            remote_block_ids=(3, 1),
            local_block_ids=(8, 20),
            tags=tagged.tags,
            timeout_s=20,
        )
        target.submit(StepPlan(step_id=0, kv=(connect, read)))
        finished = wait_for_report(target)
        assert isinstance(finished, ReadFinished)
        assert (finished.error, finished.bad_blocks) == (None, ())
        assert torch.equal(target_memory.regions[0].blocks[[8, 20]], source_memory.regions[0].blocks[[3, 1]])
        assert bool(source_memory.regions[0].blocks[3].any())
    finally:
        source.close()
        target.close()
