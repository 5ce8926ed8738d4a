from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from atom_cluster.engine.sim_runner import SimulatedRunner
from atom_cluster.messages.steps import NewRow, RowStep, StepPlan
from atom_cluster.messages.transfer import (
    BlocksTagged,
    ConnectPeer,
    DropPeer,
    KvCommand,
    KvPlacement,
    ReadBlocks,
    ReadFinished,
    TagBlocks,
)
from tests.engine.test_sim_runner import GREEDY, INSTANT, PROMPT, answer, decode, make_runner, new_row, run, sample
from tests.engine.virtual_clock import VirtualClock

EPOCH = 1234567
PLACEMENT = KvPlacement(4, 1)
SOURCE_BLOCKS = (5, 6, 7)
LOCAL_BLOCKS = (30, 20, 10)


@dataclass(frozen=True)
class Pair:
    """Two runners on one clock; the source has computed the prompt."""

    source: SimulatedRunner
    target: SimulatedRunner
    clock: VirtualClock
    first_token: int

    def tags(self) -> tuple[tuple[int, ...], ...]:
        command = TagBlocks(ticket_id="t", epoch=EPOCH, first_block=0, block_ids=SOURCE_BLOCKS, reader=PLACEMENT)
        run(self.source, StepPlan(step_id=1, kv=(command,)))
        (report,) = self.source.poll_kv()
        assert isinstance(report, BlocksTagged)
        assert (report.ticket_id, report.first_block) == ("t", 0)
        return report.tags

    def connect(self) -> ConnectPeer:
        (offer,) = self.source.info.kv_offers
        return ConnectPeer(peer="p", transport=offer.transport, descriptors=offer.descriptors, placement=PLACEMENT)

    def finish(self) -> ReadFinished:
        self.clock.sleep(60)
        (report,) = self.target.poll_kv()
        assert isinstance(report, ReadFinished)
        return report

    def tokens(self, num_tokens: int) -> list[int]:
        """The first token, and what the target samples after it with the blocks that it read."""
        tokens = (*PROMPT, self.first_token)
        new = new_row(tokens, (*LOCAL_BLOCKS, 40), num_prompt=len(PROMPT))
        plan = StepPlan(step_id=9, freed_rows=(0,), new_rows=(new,), rows=(RowStep(0, len(PROMPT), 1, samples=True),))
        second = sample(self.target, plan)
        return [self.first_token, second, *decode(self.target, len(tokens), num_tokens - 2)]


@pytest.fixture
def pair() -> Pair:
    clock = VirtualClock()
    source, target = make_runner(clock=clock), make_runner(clock=clock)
    rows = (RowStep(0, 0, len(PROMPT), samples=True),)
    first = sample(source, StepPlan(step_id=0, new_rows=(new_row(PROMPT, SOURCE_BLOCKS),), rows=rows))
    return Pair(source, target, clock, first)


def read(
    tags: tuple[tuple[int, ...], ...] = (),
    *,
    read_id: int = 1,
    remote: tuple[int, ...] = SOURCE_BLOCKS,
    local: tuple[int, ...] = LOCAL_BLOCKS,
    timeout_s: float = 10,
) -> ReadBlocks:
    return ReadBlocks(
        read_id=read_id,
        peer="p",
        epoch=EPOCH,
        remote_block_ids=remote,
        local_block_ids=local,
        tags=tags,
        timeout_s=timeout_s,
    )


def give(runner: SimulatedRunner, *commands: KvCommand) -> None:
    run(runner, StepPlan(step_id=5, kv=commands))


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_request_goes_on_with_blocks_read_from_a_peer_as_if_it_had_computed_them(
    pair: Pair, is_checked: bool
) -> None:
    give(pair.target, pair.connect(), read(pair.tags() if is_checked else ()))
    finished = pair.finish()
    assert (finished.error, finished.bad_blocks) == (None, ())
    assert finished.num_bytes > 0
    assert pair.tokens(6) == answer(PROMPT, 6)


def test_a_block_that_changed_after_it_was_tagged_is_bad(pair: Pair) -> None:
    tags = pair.tags()
    pair.source.corrupt(6)
    give(pair.target, pair.connect(), read(tags))
    assert pair.finish().bad_blocks == (1,)
    assert pair.tokens(2) != answer(PROMPT, 2)


def test_a_bad_block_that_nobody_checks_gives_other_tokens(pair: Pair) -> None:
    give(pair.target, pair.connect(), read())
    pair.source.corrupt(5)
    assert pair.finish().bad_blocks == ()
    assert pair.tokens(2) != answer(PROMPT, 2)


def test_reading_the_blocks_in_a_wrong_order_is_noticed(pair: Pair) -> None:
    give(pair.target, pair.connect(), read(pair.tags(), remote=(6, 5, 7)))
    assert pair.finish().bad_blocks == (0, 1)


def test_tags_depend_on_the_epoch(pair: Pair) -> None:
    give(
        pair.source,
        *(TagBlocks(ticket_id="t", epoch=epoch, first_block=0, block_ids=(5,), reader=PLACEMENT) for epoch in (1, 2)),
    )
    first, second = pair.source.poll_kv()
    assert isinstance(first, BlocksTagged)
    assert isinstance(second, BlocksTagged)
    assert first.tags != second.tags


def test_a_read_into_a_block_in_use_changes_the_next_token(pair: Pair) -> None:
    prefill = StepPlan(
        step_id=0, new_rows=(new_row(PROMPT, (1, 2, 3)),), rows=(RowStep(0, 0, len(PROMPT), samples=True),)
    )
    sample(pair.target, prefill)
    give(pair.target, pair.connect(), read(remote=(7,), local=(2,)))
    pair.finish()
    assert decode(pair.target, len(PROMPT), 1) != answer(PROMPT, 2)[1:]


# --- time and failures


def slow_target(pair: Pair) -> SimulatedRunner:
    """Reads one block of this many bytes per second."""
    block_bytes = 4 * 128 * 1024
    return make_runner(INSTANT.model_copy(update={"kv_bytes_per_s": block_bytes}), clock=pair.clock)


def test_reads_share_the_link_one_after_another(pair: Pair) -> None:
    target = slow_target(pair)
    give(target, pair.connect(), read(read_id=1), read(read_id=2, remote=(5,), local=(50,)))
    pair.clock.sleep(2.9)
    assert target.poll_kv() == []
    pair.clock.sleep(0.2)
    assert target.poll_kv() == [ReadFinished(read_id=1, num_bytes=3 * 4 * 128 * 1024, seconds=3.0, transport="sim")]
    pair.clock.sleep(1)
    assert target.poll_kv() == [ReadFinished(read_id=2, num_bytes=4 * 128 * 1024, seconds=4.0, transport="sim")]


def test_a_read_that_would_take_too_long_ends_with_an_error_at_its_timeout_and_frees_the_link(pair: Pair) -> None:
    target = slow_target(pair)
    give(target, pair.connect(), read(read_id=1, timeout_s=2), read(read_id=2, remote=(5,), local=(50,)))
    pair.clock.sleep(2)
    assert target.poll_kv() == [ReadFinished(read_id=1, error="timed out", seconds=2.0, transport="sim")]
    pair.clock.sleep(1)
    (second,) = target.poll_kv()
    assert isinstance(second, ReadFinished)
    assert (second.read_id, second.error) == (2, None)


def test_checksums_wait_for_no_step_and_reads_for_the_steps_before_theirs(pair: Pair) -> None:
    slow = make_runner(INSTANT.model_copy(update={"base_s": 1.0}), clock=pair.clock)
    tag = TagBlocks(ticket_id="t", epoch=EPOCH, first_block=0, block_ids=(0, 1, 2), reader=PLACEMENT)
    rows = (RowStep(0, 0, len(PROMPT), samples=True),)
    slow.submit(StepPlan(step_id=0, new_rows=(new_row(PROMPT, (0, 1, 2)),), rows=rows))
    assert slow.collect() is not None
    slow.submit(StepPlan(step_id=1, rows=(RowStep(0, len(PROMPT), 1, samples=True),)))
    slow.submit(StepPlan(step_id=2, kv=(tag, pair.connect(), read(pair.tags(), local=(7, 8, 9)))))
    (tagged,) = slow.poll_kv()
    assert isinstance(tagged, BlocksTagged)
    assert tagged.tags == pair.tags()
    pair.clock.sleep(0.5)
    assert slow.poll_kv() == []
    pair.clock.sleep(0.6)
    (finished,) = slow.poll_kv()
    assert isinstance(finished, ReadFinished)
    assert (finished.error, finished.bad_blocks) == (None, ())


def test_dropping_a_peer_ends_its_reads_with_an_error_and_forgets_it(pair: Pair) -> None:
    give(pair.target, pair.connect(), read(read_id=1), DropPeer(peer="p"), DropPeer(peer="unknown"))
    assert pair.finish().error == "the peer was dropped"
    give(pair.target, read(read_id=2))
    assert pair.finish().error == "unknown peer"


def test_a_read_that_ended_before_its_peer_was_dropped_is_good(pair: Pair) -> None:
    give(pair.target, pair.connect(), read(pair.tags()))
    pair.clock.sleep(1)
    give(pair.target, DropPeer(peer="p"))
    assert pair.finish().error is None


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_read_from_a_runner_that_is_gone_says_so(is_closed: bool) -> None:
    clock = VirtualClock()
    source, target = make_runner(clock=clock), make_runner(clock=clock)
    (offer,) = source.info.kv_offers
    give(target, ConnectPeer(peer="p", transport="sim", descriptors=offer.descriptors, placement=PLACEMENT), read())
    if is_closed:
        source.close()
    else:
        del source
        gc.collect()
    clock.sleep(60)
    (report,) = target.poll_kv()
    assert isinstance(report, ReadFinished)
    assert "gone" in (report.error or "")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (read(local=(1, 1, 2)), "distinct"),
        (read(local=(1,)), "as many"),
        (read(((1, 2),)), "one tag"),
        (read(local=(1, 2, 64)), "no blocks"),
        (read(remote=(1, 2, 64)), "named"),
    ],
)
def test_a_read_that_cannot_be_carried_out_ends_with_an_error(pair: Pair, command: ReadBlocks, error: str) -> None:
    give(pair.target, pair.connect(), command)
    assert error in (pair.finish().error or "")


@pytest.mark.parametrize(
    ("transport", "descriptors", "error"), [("tcp", (b"x",), "no transport"), ("sim", (b"x", b"y"), "2 ranks")]
)
def test_a_failed_connection_is_told_by_the_reads(
    pair: Pair, transport: str, descriptors: tuple[bytes, ...], error: str
) -> None:
    give(
        pair.target,
        ConnectPeer(peer="p", transport=transport, descriptors=descriptors, placement=PLACEMENT),
        read(read_id=1),
    )
    assert error in (pair.finish().error or "")
    give(pair.target, pair.connect(), read(read_id=2))
    assert pair.finish().error is None


# --- across processes

OTHER_PROCESS = """
import json
from atom_cluster.messages.steps import StepPlan
from tests.engine.test_sim_transfer import compute_in_another_process
print(json.dumps(compute_in_another_process()))
"""


def compute_in_another_process() -> dict[str, object]:
    """Prefill the prompt and tell what crosses processes: descriptor, first token and tags."""
    runner = make_runner()
    tag = TagBlocks(ticket_id="t", epoch=EPOCH, first_block=0, block_ids=SOURCE_BLOCKS, reader=PLACEMENT)
    new = NewRow(
        row=0,
        request_id="r",
        token_ids=PROMPT,
        num_prompt_tokens=len(PROMPT),
        pages=(SOURCE_BLOCKS,),
        sampling=GREEDY,
    )
    token = sample(runner, StepPlan(step_id=0, new_rows=(new,), rows=(RowStep(0, 0, len(PROMPT), samples=True),)))
    runner.submit(StepPlan(step_id=1, kv=(tag,)))
    (report,) = runner.poll_kv()
    assert isinstance(report, BlocksTagged)
    return {"descriptor": runner.info.kv_offers[0].descriptors[0].decode(), "token": token, "tags": report.tags}


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, object]:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", OTHER_PROCESS], cwd=root, capture_output=True, text=True, check=True)
    told: dict[str, object] = json.loads(done.stdout)
    return told


def pair_with(elsewhere: dict[str, object], tags: object) -> Pair:
    """A target that has read, from another process, blocks with these tags."""
    clock = VirtualClock()
    target = make_runner(clock=clock)
    token = elsewhere["token"]
    assert isinstance(token, int)
    peer = ConnectPeer(
        peer="p", transport="sim", descriptors=(str(elsewhere["descriptor"]).encode(),), placement=PLACEMENT
    )
    assert isinstance(tags, list)
    give(target, peer, read(tuple(tuple(of_rank) for of_rank in tags)))
    pair = Pair(target, target, clock, token)
    finished = pair.finish()
    assert (finished.error, finished.bad_blocks) == (None, ())
    return pair


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_request_goes_on_after_reading_from_another_process(elsewhere: dict[str, object], is_checked: bool) -> None:
    assert pair_with(elsewhere, elsewhere["tags"] if is_checked else []).tokens(6) == answer(PROMPT, 6)


def test_tags_that_the_tokens_do_not_lead_to_give_other_tokens(elsewhere: dict[str, object]) -> None:
    tags = elsewhere["tags"]
    assert isinstance(tags, list)
    first, second, third = tags[0]
    assert pair_with(elsewhere, [[second, first, third]]).tokens(2) != answer(PROMPT, 2)
