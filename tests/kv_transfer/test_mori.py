"""What goes wrong between ranks, over the stand-in for MORI-IO; what every transport promises: the contract suite."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer import mori, mori_engine, mori_plan, mori_reader
from tests.kv_transfer import mori_io_stand_in as stand_in
from tests.kv_transfer.mori_io_stand_in import CRIMES, ENGINES, FAULTS
from tests.kv_transfer.mori_ranks import (
    NAME,
    SCATTERED,
    Gate,
    ends_within,
    nothing_that_crashes_mori,
    reading_engines,
    start,
    two_ranks,
)
from tests.kv_transfer.ranks import exporter_elsewhere, rank_here, wait_for, wait_until


@pytest.fixture(autouse=True)
def no_crimes() -> Iterator[None]:
    with nothing_that_crashes_mori():
        yield


# --- statuses -----------------------------------------------------------------------------------------------------


def test_a_read_is_good_only_if_each_of_its_transfers_is() -> None:
    def fail_one(transfer: Any, segment: int) -> None:
        if transfer.num_segments == mori_plan.MAX_BATCH_SEGMENTS and segment == 200:
            raise RuntimeError("remote access error")

    with two_ranks() as (reader, _):
        assert reader.read(1, "peer", SCATTERED, SCATTERED).error is None
        FAULTS.before_write = fail_one
        completion = reader.read(2, "peer", SCATTERED, SCATTERED)
        assert "remote access error" in str(completion.error)
        assert completion.num_bytes == 0


def test_a_failed_transfer_ends_its_read_only_when_the_rest_of_it_has_ended() -> None:
    """A queue pair fails at segment 0 while another one holds segment 1."""
    held = Gate(lambda transfer, segment: transfer.num_segments == 3 and segment == 1)

    def fail_one(transfer: Any, segment: int) -> None:
        if transfer.num_segments == 3 and segment == 0:
            raise RuntimeError("retries exceeded")
        held(transfer, segment)

    with two_ranks() as (reader, _):
        FAULTS.before_write = fail_one
        start(reader, 1, (0, 2, 4))
        assert ends_within(reader, 0.5) == []
        assert held.reached.is_set()
        held.opened.set()
        (completion,) = wait_for(reader.transport, 1)
        assert "retries exceeded" in str(completion.error)
        reader.regions[0].blocks.fill_(0)
        FAULTS.before_write = None
        assert reader.read(2, "peer", (9,), (9,)).error is None
        assert reader.regions[0].blocks.any(dim=1).nonzero().flatten().tolist() == [9]


def test_a_late_transfer_holds_its_read_until_it_cannot_write_any_more() -> None:
    with two_ranks() as (reader, _):
        assert reader.read(1, "peer", (0,), (0,)).error is None
        FAULTS.before_write = gate = Gate()
        start(reader, 2, (1, 3), deadline_s=0.1)
        assert ends_within(reader, 1.0) == [], "it may still be written to"
        gate.opened.set()
        (completion,) = wait_for(reader.transport, 1)
        assert completion.error == "the deadline passed"
        reader.regions[0].blocks.fill_(0)
        assert ends_within(reader, 0.2) == []
        assert not reader.regions[0].blocks.any()
        assert reader.read(3, "peer", (5, 7), (5, 7)).error is None


def test_transfers_that_are_only_slow_may_end_a_little_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is not given up for them."""
    monkeypatch.setattr(mori, "_DRAIN_S", 30.0)
    with two_ranks() as (reader, _):
        assert reader.read(1, "peer", (0,), (0,)).error is None
        (engine,) = reading_engines()
        FAULTS.before_write = gate = Gate()
        start(reader, 2, (1, 3), deadline_s=0.1)
        assert ends_within(reader, 0.3) == []
        gate.opened.set()
        (completion,) = wait_for(reader.transport, 1)
        assert completion.error == "the deadline passed"
        assert reading_engines() == [engine]


def test_a_lost_status_ends_its_read_at_the_deadline() -> None:
    with two_ranks() as (reader, _):
        assert reader.read(1, "peer", (0,), (0,)).error is None
        FAULTS.loses_statuses = True
        start(reader, 2, (1, 3), deadline_s=0.1)
        (completion,) = wait_for(reader.transport, 1)
        assert completion.error == "the deadline passed"
        FAULTS.loses_statuses = False
        assert reader.read(3, "peer", (1, 3), (1, 3)).error is None


def test_statuses_may_come_in_any_order() -> None:
    done = []

    def in_reverse(transfer: Any, segment: int) -> None:
        if transfer.num_segments == mori_plan.MAX_BATCH_SEGMENTS and segment == 0:
            wait_until(lambda: bool(done))
        elif transfer.num_segments == 1:
            done.append(segment)

    with two_ranks() as (reader, exporter):
        assert reader.read(1, "peer", (1,), (1,)).error is None
        done.clear()
        FAULTS.before_write = in_reverse
        blocks = SCATTERED[: mori_plan.MAX_BATCH_SEGMENTS + 1]
        assert reader.read(2, "peer", blocks, blocks).error is None
        assert done
        assert torch.equal(reader.regions[0].blocks[list(blocks)], exporter.regions[0].blocks[list(blocks)])


def test_a_call_that_raises_leaves_its_read_in_doubt_until_the_engine_has_closed() -> None:
    with two_ranks() as (reader, _):
        assert reader.read(1, "peer", (0,), (0,)).error is None
        FAULTS.before_write, FAULTS.call_error = gate, _ = Gate(), "no more memory regions"
        start(reader, 2, (1, 3))
        assert ends_within(reader, 0.5) == []
        gate.opened.set()
        (completion,) = wait_for(reader.transport, 1)
        assert "no more memory regions" in str(completion.error)
        FAULTS.call_error = None
        assert reader.read(3, "peer", (0,), (0,)).error is None
        assert CRIMES == ["a status was dropped that MORI still writes to"], "by MORI's own wrapper"
        CRIMES.clear()


# --- peers --------------------------------------------------------------------------------------------------------


def test_reads_from_other_peers_start_again_when_one_costs_the_engine() -> None:
    with ExitStack() as stack:
        bad, good = (
            stack.enter_context(rank_here(NAME, num_blocks=8, block_bytes=(64,), seed=seed)) for seed in (1, 2)
        )
        reader = stack.enter_context(rank_here(NAME, num_blocks=8, block_bytes=(64,)))
        reader.transport.connect("bad", bad.descriptor)
        reader.transport.connect("good", good.descriptor)
        FAULTS.before_write = gate = Gate()
        start(reader, 1, (0, 2), deadline_s=0.1, peer="bad")
        start(reader, 2, (4, 6), peer="good")
        assert ends_within(reader, 1.0) == []
        gate.opened.set()
        found = {completion.read_id: completion for completion in wait_for(reader.transport, 2)}
        assert found[1].error == "the deadline passed"
        assert (found[2].error, found[2].num_bytes) == (None, 2 * 64)
        assert torch.equal(reader.regions[0].blocks[[4, 6]], good.regions[0].blocks[[4, 6]])
        assert not reader.regions[0].blocks[[1, 3, 5, 7]].any()


def test_a_peer_that_keeps_failing_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(transfer: Any, segment: int) -> None:
        if transfer.num_segments == 2:
            raise RuntimeError("protection error")

    with two_ranks() as (reader, _):
        FAULTS.before_write = fail
        for read_id in range(2):
            assert "protection error" in str(reader.read(read_id, "peer", (0, 2), (0, 2)).error)
        num_engines = len(ENGINES)
        for read_id in range(2, 6):
            assert "failed 2 times" in str(reader.read(read_id, "peer", (0, 2), (0, 2)).error)
        assert len(ENGINES) <= num_engines
        FAULTS.before_write = None
        monkeypatch.setattr(mori, "_FAILURE_WINDOW_S", 0.0)
        assert reader.read(9, "peer", (0, 2), (0, 2)).error is None


def test_a_failure_that_mori_tells_of_ends_reads_before_their_deadline() -> None:
    with two_ranks() as (reader, exporter):
        assert reader.read(1, "peer", (0,), (0,)).error is None
        (engine,) = reading_engines()
        key = next(iter(engine._remotes))
        event = stand_in.PeerFailureEvent(
            remote_engine_key=key, reason=stand_in.PeerFailureReason.PEER_UNREACHABLE, detail="link down"
        )
        FAULTS.before_write = gate = Gate()
        start(reader, 2, (1, 3))
        assert ends_within(reader, 0.1) == []
        engine.failures.append(event)
        threading.Timer(0.3, gate.opened.set).start()
        (completion,) = wait_for(reader.transport, 1)
        assert "PEER_UNREACHABLE: link down" in str(completion.error)
        FAULTS.before_write = None
        assert reader.read(3, "peer", (1,), (1,)).error is None, "in another engine"
        (engine,) = reading_engines()
        engine.failures.append(stand_in.PeerFailureEvent(remote_engine_key="", reason="", detail="device"))
        reader.transport.poll()
        assert reader.read(4, "peer", (1,), (1,)).error is None, "in yet another one"
        assert engine.is_closed


def test_another_process_at_the_address_of_the_peer_is_not_read_from() -> None:
    with rank_here(NAME, num_blocks=8, block_bytes=(64,)) as reader:
        with rank_here(NAME, num_blocks=8, block_bytes=(64,), seed=1) as exporter:
            (lender,) = [engine for engine in ENGINES if engine.get_engine_desc().key in str(exporter.descriptor)]
            port = lender.get_engine_desc().port
            del lender
            reader.transport.connect("old", exporter.descriptor)
            reader.transport.connect("used", exporter.descriptor)
            assert reader.read(1, "used", (0,), (0,)).error is None
        FAULTS.control_port = port
        with rank_here(NAME, num_blocks=8, block_bytes=(64,), seed=2) as successor:
            FAULTS.control_port = 0
            reader.regions[0].blocks.fill_(0)
            assert reader.read(2, "used", (0,), (0,)).error is not None
            assert "another process" in str(reader.read(3, "old", (0,), (0,)).error)
            assert not reader.regions[0].blocks.any()
            reader.transport.connect("new", successor.descriptor)
            assert reader.read(4, "new", (0, 3), (0, 3)).error is None
            assert torch.equal(reader.regions[0].blocks[[0, 3]], successor.regions[0].blocks[[0, 3]])


def test_a_peer_whose_process_is_gone_cannot_be_connected_to() -> None:
    with rank_here(NAME) as reader:
        with exporter_elsewhere(NAME) as exporter:
            descriptor = exporter.descriptor
        with pytest.raises(TransferError, match="is gone"):
            reader.transport.connect("peer", descriptor)


def test_a_peer_that_does_not_answer_holds_nobody_else() -> None:
    with (
        exporter_elsewhere(NAME, num_blocks=8, block_bytes=(64,)) as silent,
        rank_here(NAME, num_blocks=8, block_bytes=(64,), seed=2) as good,
        rank_here(NAME, num_blocks=8, block_bytes=(64,)) as reader,
    ):
        silent.signal(signal.SIGSTOP)
        reader.transport.connect("silent", silent.descriptor)
        reader.transport.connect("good", good.descriptor)
        start(reader, 1, (0,), deadline_s=0.8, peer="silent")
        start(reader, 2, (1,), peer="good")
        completions = wait_for(reader.transport, 2)
        assert [(done.read_id, done.error) for done in completions] == [(2, None), (1, "the deadline passed")]
        assert "cannot open" in str(reader.read(3, "silent", (0,), (0,)).error)
        silent.signal(signal.SIGCONT)
        assert reader.read(4, "silent", (0,), (0,)).error is None


def test_closing_waits_for_a_peer_that_is_being_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """MORI's engine must not be closed under a call."""
    monkeypatch.setattr(mori_engine, "_OPEN_TIMEOUT_S", 60.0)
    with (
        exporter_elsewhere(NAME, num_blocks=8, block_bytes=(64,)) as silent,
        rank_here(NAME, num_blocks=8, block_bytes=(64,)) as reader,
    ):
        silent.signal(signal.SIGSTOP)
        reader.transport.connect("peer", silent.descriptor)
        start(reader, 1, (0,))
        assert ends_within(reader, 0.2) == []
        started_s = time.monotonic()
        reader.transport.close()
        assert time.monotonic() - started_s < 30


def test_an_opening_that_gets_no_answer_leaves_nothing_that_mori_could_write_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mori_engine, "_OPEN_TIMEOUT_S", 0.2)
    with two_ranks() as (reader, _):
        FAULTS.before_write = gate = Gate(lambda transfer, segment: True)
        assert "no answer" in str(reader.read(1, "peer", (0,), (0,)).error)
        gc.collect()
        gate.opened.set()
        FAULTS.before_write = None
        assert reader.read(2, "peer", (0,), (0,)).error is None


def test_a_host_that_is_gone_is_not_left_to_mori_twice() -> None:
    with rank_here(NAME, num_blocks=8, block_bytes=(64,)) as reader:
        with rank_here(NAME, num_blocks=8, block_bytes=(64,), seed=1) as exporter:
            reader.transport.connect("peer", exporter.descriptor)
        assert "MORI-IO: connect" in str(reader.read(1, "peer", (0,), (0,)).error)
        assert "nobody answers" in str(reader.read(2, "peer", (0,), (0,)).error)


def test_an_engine_that_opened_many_peers_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mori_reader, "MAX_OPENINGS", 3)
    used = set()
    with two_ranks() as (reader, exporter):
        for attempt in range(10):
            used.update(engine.get_engine_desc().key for engine in reading_engines())
            assert reader.read(attempt, "peer", (attempt,), (attempt,)).error is None
            reader.transport.disconnect("peer")
            reader.transport.connect("peer", exporter.descriptor)
        wait_until(lambda: reader.transport.poll() == [] and len(reading_engines()) == 1)
    assert len(used) == 3


def test_an_engine_that_cannot_be_closed_fails_the_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    with two_ranks() as (reader, _):
        assert reader.read(1, "peer", (0,), (0,)).error is None
        (engine,) = reading_engines()
        FAULTS.loses_statuses = True
        start(reader, 2, (1, 3), deadline_s=0.1)
        with monkeypatch.context() as patch:
            patch.setattr(type(engine), "deregister_memory", lambda self, mem_desc: 1 / 0)
            with pytest.raises(TransferError, match="could not be closed"):
                ends_within(reader, 3)
        engine.remove_backend(type=stand_in.BackendType.RDMA)
