"""What every KvTransport promises, on one host: between two ranks of one process and between two processes."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer.pieces import Extent, PeerShape, Piece
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.registry import TransportSettings, available, missing
from atom_cluster.units import Deadline
from tests.kv_transfer.ranks import (
    LARGE,
    SECRET,
    STAND_INS,
    Exporter,
    Rank,
    allocate_for,
    exporter_elsewhere,
    open_named,
    rank_here,
    settle,
    wait_for,
)

LONG_READ = tuple(range(7, -1, -1)) * 2000
"""Descending, so never coalesced: 16,000 copies of a MiB, which takes seconds."""
needs_device = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
)
NAMES = [
    *available("cpu"),
    *(pytest.param(name, marks=pytest.mark.skip(reason=f"{name}: {why}")) for name, why in missing("cpu").items()),
    "tcp/slow",
    *(f"{name}/stand-in" for name in STAND_INS),
    *(pytest.param(f"{name}/cuda", marks=needs_device) for name in available("cuda")),
]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def large(name: str) -> tuple[int, ...]:
    """Bytes of blocks of which a long read takes seconds, or most of one where memory is as fast as a GPU's."""
    return (64 << 20,) if name in ("ipc/cuda", "nixl/cuda") else LARGE


ONLY_ELSEWHERE = "UCX reaches GPU memory of other processes only"


@contextmanager
def exporter_here(name: str) -> Iterator[Exporter]:
    if name == "nixl/cuda":
        pytest.skip(ONLY_ELSEWHERE)
    with rank_here(name, seed=7) as rank:
        yield Exporter(rank.descriptor, rank.regions, None)


@contextmanager
def near_exporter(name: str, **options: Any) -> Iterator[Exporter]:
    """In this process, if the transport can read there. options: as for `rank_here`."""
    if name == "nixl/cuda":
        with exporter_elsewhere(name, **options) as exporter:
            yield exporter
    else:
        with rank_here(name, **options) as rank:
            yield Exporter(rank.descriptor, rank.regions, None)


@pytest.fixture(params=[exporter_here, exporter_elsewhere], ids=["same process", "other process"])
def exporter(request: pytest.FixtureRequest, name: str) -> Iterator[Exporter]:
    make: Callable[[str], AbstractContextManager[Exporter]] = request.param
    with make(name) as exporter:
        yield exporter


@pytest.fixture
def reader(name: str) -> Iterator[Rank]:
    with rank_here(name) as rank:
        yield rank


@pytest.fixture
def pair(reader: Rank, exporter: Exporter) -> tuple[Rank, Exporter]:
    reader.transport.connect("peer", exporter.descriptor)
    return reader, exporter


def assert_copied(
    reader: Rank, source: tuple[KvRegion, ...], remote: tuple[int, ...], local: tuple[int, ...], group: int = 0
) -> None:
    """The blocks of the group were copied, and no other block of any group was touched."""
    others = [block for block in range(16) if block not in local]
    for index, (target, origin) in enumerate(zip(reader.regions, source, strict=True)):
        if index == group:
            assert torch.equal(target.blocks[list(local)], origin.blocks[list(remote)])
            assert not target.blocks[others].any()
        else:
            assert not target.blocks.any()


BLOCKS = (
    ((3,), (11,)),
    ((4, 5, 6), (0, 1, 2)),
    ((9, 2, 3, 15), (15, 4, 5, 0)),
    (tuple(range(16)), tuple(range(15, -1, -1))),
)
"""Of the peer and here: one, adjacent ones, scattered ones, all reversed."""


def test_copies_the_right_blocks_of_a_group_and_no_others(pair: tuple[Rank, Exporter], name: str) -> None:
    reader, exporter = pair
    for group, (remote, local) in itertools.product(range(3), BLOCKS):
        for region in reader.regions:
            region.blocks.zero_()
        settle(name)
        completion = reader.read(1, "peer", remote, local, group)
        assert (completion.read_id, completion.error) == (1, None)
        assert completion.num_bytes == len(remote) * exporter.regions[group].block_bytes
        assert_copied(reader, exporter.regions, remote, local, group)


def test_groups_have_their_own_numbers_of_blocks_and_reads_of_several_run_together(name: str) -> None:
    def regions(sizes: tuple[int, int], content: int) -> tuple[KvRegion, ...]:
        return tuple(
            KvRegion(f"group {i}", allocate_for(name, n * size).view(n, size).fill_(content))
            for i, (n, size) in enumerate(zip(sizes, (64, 4096)))
        )

    if name == "nixl/cuda":
        pytest.skip(ONLY_ELSEWHERE)
    settings = TransportSettings(rank=0, host="127.0.0.1", secret=SECRET)
    source, target = regions((9, 3), 7), regions((4, 6), 0)
    settle(name)
    exporter, reader = open_named(name, settings), open_named(name, settings)
    try:
        reader.export(target)
        reader.connect("peer", exporter.export(source))
        reader.start_read(1, "peer", 0, (8,), (3,), Deadline.after(20))
        reader.start_read(2, "peer", 1, (2, 0), (5, 1), Deadline.after(20))
        reader.start_read(3, "peer", 1, (3,), (0,), Deadline.after(20))
        reader.start_read(4, "peer", 0, (0,), (4,), Deadline.after(20))
        reader.start_read(5, "peer", 2, (0,), (0,), Deadline.after(20))
        found = {done.read_id: done for done in wait_for(reader, 5)}
        assert [found[i].num_bytes for i in (1, 2)] == [64, 2 * 4096]
        assert all("outside" in str(found[i].error) for i in (3, 4))
        assert "no group 2" in str(found[5].error)
        assert target[0].blocks.any(dim=1).nonzero().flatten().tolist() == [3]
        assert target[1].blocks.any(dim=1).nonzero().flatten().tolist() == [1, 5]
    finally:
        reader.close()
        exporter.close()


def test_reads_of_many_blocks_are_cut_and_put_together_right(name: str) -> None:
    with (
        exporter_elsewhere(name, num_blocks=300, block_bytes=(1 << 17,)) as exporter,
        rank_here(name, num_blocks=300, block_bytes=(1 << 17,)) as reader,
    ):
        reader.transport.connect("peer", exporter.descriptor)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).tolist()
        assert reader.read(1, "peer", tuple(range(300)), tuple(order)).error is None
        assert torch.equal(reader.regions[0].blocks[order], exporter.regions[0].blocks)


def test_many_reads_under_way_each_end_once(pair: tuple[Rank, Exporter]) -> None:
    reader, exporter = pair
    for read_id in range(200):
        block = read_id % 16
        reader.transport.start_read(read_id, "peer", 0, (block,), (block,), Deadline.after(20))
    completions = wait_for(reader.transport, 200)
    assert sorted(completion.read_id for completion in completions) == list(range(200))
    assert all(completion.error is None for completion in completions)
    assert reader.transport.poll() == []
    assert_copied(reader, exporter.regions, tuple(range(16)), tuple(range(16)))


def test_a_read_of_nothing_ends(pair: tuple[Rank, Exporter]) -> None:
    reader, _ = pair
    assert reader.read(1, "peer", (), ()).error is None


def test_reads_from_two_peers_do_not_mix(name: str, reader: Rank) -> None:
    with near_exporter(name, seed=1) as one, near_exporter(name, seed=2) as two:
        reader.transport.connect("one", one.descriptor)
        reader.transport.connect("two", two.descriptor)
        reader.transport.start_read(1, "one", 0, (0, 1), (4, 5), Deadline.after(20))
        reader.transport.start_read(2, "two", 0, (0, 1), (8, 9), Deadline.after(20))
        assert {completion.error for completion in wait_for(reader.transport, 2)} == {None}
        assert torch.equal(reader.regions[0].blocks[4:6], one.regions[0].blocks[0:2])
        assert torch.equal(reader.regions[0].blocks[8:10], two.regions[0].blocks[0:2])


def test_connecting_twice_changes_nothing(pair: tuple[Rank, Exporter]) -> None:
    reader, exporter = pair
    reader.transport.connect("peer", exporter.descriptor)
    assert reader.read(1, "peer", (1,), (1,)).error is None


@pytest.mark.parametrize("garbage", [b"", b"\x00", b"\xff" * 100, b"\x80", b"x" * 1_000_000])
def test_a_wrong_descriptor_is_refused(reader: Rank, garbage: bytes) -> None:
    with pytest.raises(TransferError):
        reader.transport.connect("peer", garbage)


def test_a_damaged_descriptor_is_refused_or_its_reads_fail(name: str, reader: Rank) -> None:
    with rank_here(name, seed=7) as exporter:
        for position in range(0, len(exporter.descriptor), 7):
            damaged = bytearray(exporter.descriptor)
            damaged[position] ^= 1
            try:
                reader.transport.connect(f"peer {position}", bytes(damaged))
            except TransferError:
                continue
            reader.transport.start_read(position, f"peer {position}", 0, (0,), (0,), Deadline.after(0.2))
            wait_for(reader.transport, 1)


def test_descriptors_of_another_rank_or_layout_are_refused(name: str, reader: Rank) -> None:
    with rank_here(name, rank=1) as other_rank, rank_here(name, block_bytes=(64, 200, 4104)) as other_layout:
        with pytest.raises(TransferError, match="rank 1"):
            reader.transport.connect("peer", other_rank.descriptor)
        with pytest.raises(TransferError, match="4104"):
            reader.transport.connect("peer", other_layout.descriptor)


def test_peers_may_have_other_numbers_of_blocks(name: str, reader: Rank) -> None:
    with near_exporter(name, num_blocks=40, seed=7) as exporter:
        reader.transport.connect("peer", exporter.descriptor)
        assert reader.read(1, "peer", (39,), (15,)).error is None
        assert "outside" in str(reader.read(2, "peer", (40,), (0,)).error)
        assert "outside" in str(reader.read(3, "peer", (0,), (16,)).error)
        assert "outside" in str(reader.read(4, "peer", (-1,), (0,)).error)


PIECES = (
    Piece(Extent(1000, 24, 5, 100), Extent(0, 24, 5, 24)),
    Piece(Extent(0, 8), Extent(4088, 8)),
    Piece(Extent(2000, 160), Extent(160, 160)),
    Piece(Extent(3000, 40, 3, 40), Extent(400, 40, 3, 400)),
)
"""Of blocks of 4096 bytes: runs put together, pulled apart, and neither."""


def bytes_of(extents: list[Extent]) -> list[int]:
    return [e.offset + run * e.stride + at for e in extents for run in range(e.count) for at in range(e.num_bytes)]


REMOTE_BYTES, LOCAL_BYTES = (bytes_of(side) for side in zip(*((piece.remote, piece.local) for piece in PIECES)))


def test_pieces_of_blocks_are_copied_and_nothing_else_of_them_is_touched(
    pair: tuple[Rank, Exporter], name: str
) -> None:
    reader, exporter = pair
    target, source = reader.regions[2].blocks, exporter.regions[2].blocks
    for remote, local in BLOCKS[:3]:
        target.fill_(77)
        settle(name)
        completion = reader.read(1, "peer", remote, local, 2, PIECES)
        assert (completion.error, completion.num_bytes) == (None, len(remote) * len(LOCAL_BYTES))
        expected = torch.full_like(target, 77)
        for there, here in zip(remote, local):
            expected[here, LOCAL_BYTES] = source[there, REMOTE_BYTES].to(target.device)
        assert torch.equal(target, expected)
    assert not reader.regions[0].blocks.any() and not reader.regions[1].blocks.any()


def test_reads_into_different_pieces_of_the_same_blocks_run_together(pair: tuple[Rank, Exporter]) -> None:
    reader, exporter = pair
    blocks = tuple(range(16))
    for part in range(16):
        pieces = (Piece(Extent(256 * part, 256), Extent(256 * (15 - part), 256)),)
        reader.transport.start_read(part, "peer", 2, blocks, blocks, Deadline.after(20), pieces)
    assert {completion.error for completion in wait_for(reader.transport, 16)} == {None}
    parts = exporter.regions[2].blocks.view(16, 16, 256)
    assert torch.equal(reader.regions[2].blocks, parts.flip(1).reshape(16, 4096).to(reader.regions[2].blocks.device))


def test_pieces_that_are_not_within_a_block_end_with_an_error(pair: tuple[Rank, Exporter]) -> None:
    reader, _ = pair
    for piece in (
        Piece(Extent(4096, 8), Extent(0, 8)),
        Piece(Extent(0, 8), Extent(4090, 8)),
        Piece(Extent(0, 8, 3, 2048), Extent(0, 8, 3, 8)),
        Piece(Extent(-8, 8), Extent(0, 8)),
    ):
        assert "not within a block" in str(reader.read(1, "peer", (0,), (0,), 2, (piece,)).error)
    assert not reader.regions[2].blocks.any()


def test_a_rank_of_another_number_with_blocks_of_other_sizes_is_read_from_in_pieces(name: str, reader: Rank) -> None:
    with near_exporter(name, rank=3, block_bytes=(128, 200, 2048), seed=7) as exporter:
        for wrong in (PeerShape(2, (128, 200, 2048)), PeerShape(3, (128, 200, 4096)), None):
            with pytest.raises(TransferError, match="expected w"):
                reader.transport.connect("peer", exporter.descriptor, wrong)
        reader.transport.connect("peer", exporter.descriptor, PeerShape(3, (128, 200, 2048)))
        pieces = (Piece(Extent(0, 2048), Extent(2048, 2048)),)
        assert reader.read(1, "peer", (3, 9), (5, 2), 2, pieces).error is None
        assert torch.equal(reader.regions[2].blocks[[5, 2], 2048:], exporter.regions[2].blocks[[3, 9]])
        assert not reader.regions[2].blocks[:, :2048].any()
        assert "whole blocks of another size" in str(reader.read(2, "peer", (3,), (5,), 2).error)


def test_reading_from_an_unknown_peer_ends_with_an_error(reader: Rank) -> None:
    assert "unknown peer" in str(reader.read(1, "nobody", (0,), (0,)).error)


def test_a_read_whose_deadline_passed_ends_with_an_error_and_writes_nothing(pair: tuple[Rank, Exporter]) -> None:
    reader, exporter = pair
    reader.transport.start_read(1, "peer", 0, (1,), (1,), Deadline.after(-1))
    (completion,) = wait_for(reader.transport, 1)
    assert "deadline" in str(completion.error)
    assert reader.read(2, "peer", (2,), (2,)).error is None
    assert_copied(reader, exporter.regions, (2,), (2,))


@contextmanager
def long_read(name: str, deadline_s: float) -> Iterator[tuple[Rank, Exporter]]:
    """A read that would take seconds is under way, as read 1."""
    with (
        exporter_elsewhere(name, num_blocks=8, block_bytes=large(name)) as exporter,
        rank_here(name, num_blocks=16, block_bytes=large(name)) as reader,
    ):
        reader.transport.connect("peer", exporter.descriptor)
        assert reader.read(0, "peer", (0,), (8,)).error is None
        reader.transport.start_read(1, "peer", 0, LONG_READ, LONG_READ, Deadline.after(deadline_s))
        yield reader, exporter


def test_nothing_is_written_after_a_deadline_passed_in_the_middle(name: str) -> None:
    with long_read(name, deadline_s=0.2) as (reader, _):
        (completion,) = wait_for(reader.transport, 1)
        assert "deadline" in str(completion.error)
        reader.regions[0].blocks.fill_(0)
        assert reader.read(2, "peer", (3,), (12,)).error is None
        assert not reader.regions[0].blocks[:8].any()


def test_nothing_is_written_after_a_disconnect_in_the_middle(name: str) -> None:
    with long_read(name, deadline_s=60) as (reader, exporter):
        reader.transport.disconnect("peer")
        (completion,) = wait_for(reader.transport, 1)
        assert (completion.read_id, completion.error) == (1, "disconnected")
        reader.regions[0].blocks.fill_(0)
        assert "unknown peer" in str(reader.read(2, "peer", (0,), (0,)).error)
        reader.transport.connect("peer", exporter.descriptor)
        assert reader.read(3, "peer", (3,), (12,)).error is None
        assert not reader.regions[0].blocks[:8].any()


def test_a_peer_killed_in_the_middle_of_a_read_ends_it_with_an_error(name: str) -> None:
    with long_read(name, deadline_s=60) as (reader, exporter):
        exporter.signal(signal.SIGKILL)
        (completion,) = wait_for(reader.transport, 1)
        assert completion.error is not None
        assert "deadline" not in completion.error
        assert reader.read(2, "peer", (0,), (0,)).error is not None


def test_a_peer_that_stands_still_does_not_hold_reads_beyond_their_deadline(name: str) -> None:
    with exporter_elsewhere(name) as exporter, rank_here(name) as reader:
        reader.transport.connect("peer", exporter.descriptor)
        assert reader.read(0, "peer", (0,), (8,)).error is None
        exporter.signal(signal.SIGSTOP)
        reader.transport.start_read(1, "peer", 0, (0, 1), (0, 1), Deadline.after(0.3))
        (stopped,) = wait_for(reader.transport, 1)
        if stopped.error is not None:  # shared memory can be read all the same
            reader.regions[0].blocks[:2] = 0
        exporter.signal(signal.SIGCONT)
        assert reader.read(2, "peer", (5,), (9,)).error is None
        written = exporter.regions[0].blocks[:2]
        expected = written if stopped.error is None else torch.zeros_like(written)
        assert torch.equal(reader.regions[0].blocks[:2], expected)


def test_closing_abandons_reads_writes_nothing_afterwards_and_may_be_repeated(name: str) -> None:
    with long_read(name, deadline_s=60) as (reader, _):
        reader.transport.close()
        before = reader.regions[0].blocks.clone()
        reader.transport.close()
        assert torch.equal(reader.regions[0].blocks, before)


def test_unknown_peers_can_be_disconnected(reader: Rank) -> None:
    reader.transport.disconnect("nobody")


def open_resources() -> tuple[int, int, int]:
    gc.collect()
    with open("/proc/self/maps") as maps:
        num_mappings = sum("memfd:atom_cluster_kv" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), num_mappings


def test_no_descriptors_threads_or_mappings_are_left_behind(name: str) -> None:
    def use() -> None:
        with near_exporter(name, seed=7) as exporter, rank_here(name) as reader:
            for attempt in range(3):
                reader.transport.connect("peer", exporter.descriptor)
                assert reader.read(attempt, "peer", (0, 1), (0, 1)).error is None
                reader.transport.disconnect("peer")

    use()
    before = open_resources()
    for _ in range(5):
        use()
    assert open_resources() == before
