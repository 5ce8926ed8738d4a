"""When reads through NIXL end, and what becomes of the agent, with an agent whose transfers end when the test says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer import nixl_reader
from atom_cluster.kv_transfer.nixl_agent import Memory, Pieces, Transfer
from atom_cluster.kv_transfer.nixl_reader import BlockLayout, BlockReader, PeerMemory, ReadOrder
from atom_cluster.kv_transfer.pieces import Extent, Piece
from atom_cluster.kv_transfer.protocol import ReadCompletion
from atom_cluster.units import Deadline, MiB
from tests.kv_transfer.ranks import wait_until

DRAM = Memory("DRAM", 0)
OURS = BlockLayout(address=1 << 30, stride_bytes=MiB, block_bytes=MiB)
THEIRS = BlockLayout(address=1 << 40, stride_bytes=3 * MiB, block_bytes=MiB)
Row = tuple[int, int, int]


@dataclass
class Posted:
    """A transfer, and how it stands."""

    peer: str
    pieces: Pieces
    is_done: bool = False
    error: str = ""

    @property
    def rows(self) -> list[Row]:
        """Local address, remote address and length, counted from the first block."""
        columns = (self.pieces.local - OURS.address, self.pieces.remote - THEIRS.address, self.pieces.num_bytes)
        return [(int(to), int(fro), int(size)) for to, fro, size in zip(*columns)]


@dataclass
class FakeAgent:
    """Does nothing until it is told."""

    posted: dict[Transfer, Posted] = field(default_factory=dict)
    connected: list[bytes] = field(default_factory=list)
    disconnected: list[str] = field(default_factory=list)
    completes_at_once: bool = False
    post_error: str = ""
    connect_error: str = ""
    close_error: str = ""
    is_closed: bool = False

    def connect(self, metadata: bytes) -> str:
        if self.connect_error:
            raise TransferError(self.connect_error)
        self.connected.append(metadata)
        return f"agent of {metadata.decode()}"

    def disconnect(self, name: str) -> None:
        self.disconnected.append(name)

    def post(self, name: str, memory: Memory, pieces: Pieces) -> Transfer:
        assert not self.is_closed
        if self.post_error:
            raise TransferError(self.post_error)
        transfer = Transfer(handle=None)
        self.posted[transfer] = Posted(name, pieces, is_done=self.completes_at_once)
        return transfer

    def is_over(self, transfer: Transfer) -> bool:
        assert not self.is_closed
        posted = self.posted[transfer]
        if posted.error:
            raise TransferError(posted.error)
        return posted.is_done

    def progress(self) -> None:
        assert not self.is_closed

    def close(self) -> None:
        if self.close_error:
            raise TransferError(self.close_error)
        self.is_closed = True

    def of(self, peer: str) -> list[Posted]:
        """Transfers from a peer, in order."""
        return [posted for posted in self.posted.values() if posted.peer == f"agent of {peer}"]


class Bench:
    """A reader whose agents are fakes."""

    def __init__(self) -> None:
        self.agents: list[FakeAgent] = []
        self.prepare: Callable[[FakeAgent], None] = lambda agent: None
        self.reader = BlockReader(make_agent=self.make_agent, layouts=[OURS])

    def make_agent(self) -> FakeAgent:
        agent = FakeAgent()
        self.prepare(agent)
        self.agents.append(agent)
        return agent

    def connect(self, *peers: str) -> None:
        for peer in peers:
            self.reader.connect(peer, PeerMemory(peer.encode(), DRAM, (THEIRS,)))

    def start(
        self,
        read_id: int,
        peer: str,
        blocks: tuple[int, ...] = (0,),
        *,
        deadline_s: float = 30,
        pieces: tuple[Piece, ...] | None = None,
    ) -> None:
        self.reader.start(ReadOrder(read_id, peer, 0, blocks, blocks, Deadline.after(deadline_s), pieces))

    def ended(self, count: int = 1) -> list[ReadCompletion]:
        completions: list[ReadCompletion] = []

        def has_all() -> bool:
            completions.extend(self.reader.poll())
            return len(completions) >= count

        wait_until(has_all, 10)
        return completions

    def posted(self, count: int, *, agent: int = 0) -> list[Posted]:
        """The transfers of an agent, once there are this many."""
        wait_until(lambda: len(self.agents) > agent and len(self.agents[agent].posted) >= count, 10)
        return list(self.agents[agent].posted.values())


@pytest.fixture
def patient_bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Waits for transfers of reads that are to stop as long as it takes."""
    monkeypatch.setattr(nixl_reader, "_LINGER_S", 60.0)
    bench = Bench()
    yield bench
    bench.reader.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, patient_bench: Bench) -> Bench:
    """Waits for them a moment only."""
    monkeypatch.setattr(nixl_reader, "_LINGER_S", 0.1)
    return patient_bench


def test_adjacent_blocks_on_both_sides_are_one_piece(bench: Bench) -> None:
    dense = BlockLayout(THEIRS.address, MiB, MiB)
    bench.reader.connect("peer", PeerMemory(b"peer", DRAM, (dense,)))
    bench.reader.start(ReadOrder(1, "peer", 0, (4, 5, 6, 2, 3), (0, 1, 2, 3, 7), Deadline.after(30)))
    (posted,) = bench.posted(1)
    assert posted.rows == [(0, 4 * MiB, 3 * MiB), (3 * MiB, 2 * MiB, MiB), (7 * MiB, 3 * MiB, MiB)]


def test_blocks_that_are_apart_at_the_peer_are_pieces_of_their_own(bench: Bench) -> None:
    bench.connect("peer")
    bench.start(1, "peer", (4, 5))
    (posted,) = bench.posted(1)
    assert posted.rows == [(4 * MiB, 12 * MiB, MiB), (5 * MiB, 15 * MiB, MiB)]


def test_parts_of_blocks_are_found_on_both_sides_and_joined_where_they_touch(bench: Bench) -> None:
    bench.connect("peer")
    pieces = (
        Piece(remote=Extent(100, 10, count=2, stride=50), local=Extent(0, 10, count=2, stride=10)),
        Piece(remote=Extent(160, 5), local=Extent(20, 5)),
    )
    bench.start(1, "peer", (0, 2), pieces=pieces)
    (posted,) = bench.posted(1)
    first = [(0, 100, 10), (10, 150, 15)]
    assert posted.rows == first + [(to + 2 * MiB, fro + 6 * MiB, size) for to, fro, size in first]
    posted.is_done = True
    (completion,) = bench.ended()
    assert (completion.error, completion.num_bytes) == (None, 50)


def test_a_read_is_cut_into_transfers_of_which_few_are_under_way(bench: Bench) -> None:
    bench.connect("peer")
    bench.start(1, "peer", tuple(range(100)))
    transfers = bench.posted(8)
    time.sleep(0.05)
    assert len(bench.agents[0].posted) == 8
    assert [sum(row[2] for row in posted.rows) for posted in transfers] == [8 * MiB] * 8
    transfers[5].is_done = True
    assert bench.posted(9)[8].rows[0][0] == 64 * MiB
    for number in range(13):
        bench.posted(number + 1)[number].is_done = True
    (completion,) = bench.ended()
    assert (completion.error, completion.num_bytes) == (None, 100 * MiB)


def test_a_peer_that_answers_slowly_does_not_take_the_place_of_others(bench: Bench) -> None:
    bench.connect("slow", "fast")
    bench.start(1, "slow", tuple(range(100)))
    bench.posted(8)
    bench.start(2, "fast")
    bench.posted(9)[8].is_done = True
    assert bench.ended()[0].read_id == 2


def test_a_late_read_ends_when_its_transfers_do_and_the_agent_stays(patient_bench: Bench) -> None:
    bench = patient_bench
    bench.connect("peer")
    bench.start(1, "peer", tuple(range(100)), deadline_s=1)
    transfers = bench.posted(8)
    time.sleep(1.1)
    assert bench.reader.poll() == []
    for posted in transfers:
        posted.is_done = True
    (completion,) = bench.ended()
    assert (completion.error, completion.num_bytes) == ("the deadline passed", 0)
    assert len(bench.agents[0].posted) == 8
    assert not bench.agents[0].is_closed


def test_a_read_that_does_not_end_completes_only_when_the_agent_is_destroyed(bench: Bench) -> None:
    bench.connect("peer")
    closed_at_completion = []

    class Watcher(type(bench.reader._completions)):  # type: ignore[misc]
        def append(self, completion: ReadCompletion) -> None:
            closed_at_completion.append(bench.agents[0].is_closed)
            super().append(completion)

    bench.reader._completions = Watcher()
    bench.start(1, "peer", deadline_s=1)
    (completion,) = bench.ended()
    assert completion.error == "the deadline passed"
    assert closed_at_completion == [True]


def test_reads_from_other_peers_begin_anew_with_what_they_lack(bench: Bench) -> None:
    bench.connect("stuck", "well")
    bench.start(1, "well", tuple(range(24)))
    first, second, third = bench.posted(3)
    second.is_done = True
    bench.start(2, "stuck")
    bench.posted(4)
    bench.reader.disconnect("stuck")
    assert bench.ended()[0].read_id == 2
    again = bench.posted(2, agent=1)
    assert bench.agents[0].is_closed
    assert bench.agents[1].connected == [b"well"]
    assert [posted.rows for posted in again] == [first.rows, third.rows]
    for posted in again:
        posted.is_done = True
    (completion,) = bench.ended()
    assert (completion.read_id, completion.error, completion.num_bytes) == (1, None, 24 * MiB)


def test_one_failed_transfer_fails_the_reads_from_that_peer_and_destroys_the_agent(bench: Bench) -> None:
    bench.connect("broken", "well")
    bench.start(1, "broken", tuple(range(24)))
    bench.start(2, "broken")
    bench.start(3, "well")
    transfers = bench.posted(5)
    transfers[0].is_done = transfers[2].is_done = True
    transfers[1].error = "state ERR"
    errors = {completion.read_id: completion.error for completion in bench.ended(2)}
    assert errors == {1: "state ERR", 2: "state ERR"}
    assert bench.agents[0].is_closed
    bench.posted(1, agent=1)[0].is_done = True
    assert bench.ended()[0].error is None


def test_a_transfer_that_cannot_be_posted_fails_the_read_and_destroys_the_agent(bench: Bench) -> None:
    def fail_first(agent: FakeAgent) -> None:
        agent.post_error = "" if bench.agents else "no route"

    bench.prepare = fail_first
    bench.connect("peer")
    bench.start(1, "peer")
    assert bench.ended()[0].error == "no route"
    assert bench.agents[0].is_closed


def test_a_peer_that_failed_costs_no_further_agent_for_a_while_and_then_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_reader, "_RETRY_S", 3600.0)
    bench.prepare = lambda agent: setattr(agent, "connect_error", "" if bench.agents else "unreachable")
    bench.connect("peer")
    bench.start(1, "peer")
    assert bench.ended()[0].error == "unreachable"
    bench.start(2, "peer")
    assert bench.ended()[0].error == "unreachable"
    assert len(bench.agents) == 1
    bench.reader._peers["peer"].retry_at_s = time.monotonic()
    bench.start(3, "peer")
    bench.posted(1, agent=1)[0].is_done = True
    assert bench.ended()[0].error is None


def test_an_agent_that_cannot_be_made_fails_the_reads(bench: Bench) -> None:
    def fail(agent: FakeAgent) -> None:
        raise TransferError("cannot register the KV memory")

    bench.prepare = fail
    bench.connect("peer")
    bench.start(1, "peer")
    assert bench.ended()[0].error == "cannot register the KV memory"


def test_a_disconnected_peer_is_forgotten_when_its_reads_have_drained(patient_bench: Bench) -> None:
    bench = patient_bench
    bench.connect("peer")
    bench.start(1, "peer", tuple(range(100)))
    transfers = bench.posted(8)
    bench.reader.disconnect("peer")
    time.sleep(0.05)
    assert bench.reader.poll() == []
    for posted in transfers:
        posted.is_done = True
    assert bench.ended()[0].error == "disconnected"
    wait_until(lambda: bench.agents[0].disconnected == ["agent of peer"])
    assert len(bench.agents[0].posted) == 8


def test_a_peer_under_two_names_is_not_forgotten_with_the_first(bench: Bench) -> None:
    bench.connect("peer")
    bench.reader.connect("again", PeerMemory(b"peer", DRAM, (THEIRS,)))
    bench.start(1, "peer")
    bench.start(2, "again")
    for posted in bench.posted(2):
        posted.is_done = True
    bench.ended(2)
    bench.reader.disconnect("peer")
    bench.start(3, "again")
    bench.posted(3)[2].is_done = True
    assert bench.ended()[0].error is None
    assert bench.agents[0].disconnected == []


def test_a_disconnect_does_not_wait_for_a_peer_that_stands_still(bench: Bench) -> None:
    bench.connect("peer")
    bench.start(1, "peer")
    bench.posted(1)
    bench.reader.disconnect("peer")
    assert bench.ended()[0].error == "disconnected"
    assert bench.agents[0].is_closed


def test_an_agent_that_cannot_be_destroyed_fails_the_rank_and_completes_nothing(bench: Bench) -> None:
    bench.prepare = lambda agent: setattr(agent, "close_error", "still in use")
    bench.connect("peer")
    bench.start(1, "peer", deadline_s=1)

    def has_failed() -> bool:
        try:
            assert bench.reader.poll() == []
        except TransferError as exc:
            assert "still in use" in str(exc)
            return True
        return False

    wait_until(has_failed, 10)
    with pytest.raises(TransferError, match="still in use"):
        bench.reader.close()
    bench.agents[0].close_error = ""
    bench.reader._agent = None


def test_closing_destroys_the_agent_with_reads_under_way(bench: Bench) -> None:
    bench.connect("peer")
    bench.start(1, "peer")
    bench.posted(1)
    bench.reader.close()
    bench.reader.close()
    assert bench.agents[0].is_closed
    assert bench.reader.poll() == []


def test_pieces_are_addresses_that_nixl_takes(bench: Bench) -> None:
    bench.connect("peer")
    bench.start(1, "peer", (0, 1))
    (posted,) = bench.posted(1)
    columns = (posted.pieces.local, posted.pieces.remote, posted.pieces.num_bytes)
    assert [column.dtype for column in columns] == [np.uint64] * 3
