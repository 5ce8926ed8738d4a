from __future__ import annotations

import random

import pytest

from atom_cluster.kv_transfer import ipc_copies
from atom_cluster.kv_transfer.ipc_copies import Batch, Ramp, Rows, batches
from atom_cluster.kv_transfer.pieces import Extent, Piece
from atom_cluster.kv_transfer.regions import id_array

SOURCE, TARGET = Rows(1_000_000, 100), Rows(5_000_000, 100)


def planned(
    remote: tuple[int, ...],
    local: tuple[int, ...],
    *,
    pieces: tuple[Piece, ...] | None = None,
    source: Rows = SOURCE,
    target: Rows = TARGET,
    block_bytes: int = 100,
    kernel_below_bytes: int = 0,
) -> list[Batch]:
    return list(
        batches(
            id_array(remote),
            id_array(local),
            pieces,
            source=source,
            target=target,
            block_bytes=block_bytes,
            kernel_below_bytes=kernel_below_bytes,
            ramp=Ramp(),
        )
    )


def copies(found: list[Batch]) -> list[tuple[int, int, int]]:
    """Offset in the target, in the source, bytes."""
    return [
        (int(target) - TARGET.address, int(source) - SOURCE.address, int(size))
        for batch in found
        for target, source, size in zip(batch.targets, batch.sources, batch.sizes, strict=True)
    ]


def byte_moves(found: list[Batch]) -> dict[int, int]:
    """Where each byte of the target comes from; no byte may be written twice."""
    moves: dict[int, int] = {}
    for to, fro, size in copies(found):
        for i in range(size):
            assert to + i not in moves
            moves[to + i] = fro + i
    return moves


def test_blocks_adjacent_on_both_sides_are_copied_together() -> None:
    found = planned((3, 4, 5, 9, 10, 2), (0, 1, 2, 3, 5, 6))
    assert copies(found) == [(0, 300, 300), (300, 900, 100), (500, 1000, 100), (600, 200, 100)]
    assert [batch.by_kernel for batch in found] == [False]


def test_blocks_with_gaps_between_them_are_copied_one_by_one() -> None:
    found = planned((0, 1), (0, 1), source=Rows(SOURCE.address, 128))
    assert copies(found) == [(0, 0, 100), (100, 128, 100)]


@pytest.mark.parametrize(("below", "by_kernel"), [(150, False), (151, True), (1 << 62, True)])
def test_the_mean_run_decides_who_copies(below: int, by_kernel: bool) -> None:
    (batch,) = planned((0, 1, 5), (0, 1, 5), kernel_below_bytes=below)
    assert batch.by_kernel is by_kernel
    assert batch.sizes.tolist() == ([100, 100, 100] if by_kernel else [200, 100])


def test_batches_have_limits_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc_copies, "BATCH_BYTES", 1000)
    monkeypatch.setattr(ipc_copies, "_MAX_COMMANDS", 7)
    monkeypatch.setattr(ipc_copies, "MAX_COPIES", 5)
    monkeypatch.setattr(ipc_copies, "KERNEL_BATCH_BYTES", 450)
    shuffled = random.Random(1).sample(range(60), 60)
    remote = (*range(100, 140), *shuffled)
    for kernel_below_bytes in (0, 1000):
        found = planned(remote, tuple(range(100)), kernel_below_bytes=kernel_below_bytes)
        assert byte_moves(found) == {to * 100 + i: fro * 100 + i for to, fro in enumerate(remote) for i in range(100)}
        assert max(batch.num_bytes for batch in found) == (400 if kernel_below_bytes else 1000)
        assert max(len(batch.sizes) for batch in found) == (4 if kernel_below_bytes else 7)
    monkeypatch.setattr(ipc_copies, "KERNEL_BATCH_BYTES", 1000)
    assert max(len(batch.sizes) for batch in planned(remote, tuple(range(100)), kernel_below_bytes=1000)) == 5


@pytest.mark.parametrize("pieces", [None, (Piece(Extent(0, 100), Extent(0, 100)),)])
def test_copy_engines_begin_with_few_copies(pieces: tuple[Piece, ...] | None) -> None:
    blocks = tuple(range(0, 4000, 2))
    found = planned(blocks, blocks, pieces=pieces)
    rest = [512, 512, 480] if pieces is None else [16, 512, 512, 464]  # pieces are those of 512 blocks at a time
    assert [len(batch.sizes) for batch in found] == [16, 32, 64, 128, 256, *rest]


def test_a_block_larger_than_a_batch_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc_copies, "BATCH_BYTES", 30)
    assert [batch.num_bytes for batch in planned((0, 1, 2), (0, 1, 2))] == [100, 100, 100]


def test_nothing_is_no_batch() -> None:
    assert planned((), ()) == []
    assert planned((), (), pieces=(Piece(Extent(0, 10), Extent(0, 10)),)) == []


@pytest.mark.parametrize("kernel_below_bytes", [0, 1000])
def test_pieces_of_blocks_of_other_sizes_go_where_they_belong(
    monkeypatch: pytest.MonkeyPatch, kernel_below_bytes: int
) -> None:
    monkeypatch.setattr(ipc_copies, "_MAX_COMMANDS", 7)
    monkeypatch.setattr(ipc_copies, "MAX_COPIES", 7)
    pieces = (
        Piece(remote=Extent(8, 4, count=3, stride=16), local=Extent(20, 4, count=3, stride=8)),
        Piece(remote=Extent(0, 5), local=Extent(90, 5)),
    )
    found = planned(
        (4, 1, 7), (0, 3, 2), pieces=pieces, source=Rows(SOURCE.address, 60), kernel_below_bytes=kernel_below_bytes
    )
    expected = {}
    for fro, to in ((4, 0), (1, 3), (7, 2)):
        for run in range(3):
            expected |= {to * 100 + 20 + run * 8 + i: fro * 60 + 8 + run * 16 + i for i in range(4)}
        expected |= {to * 100 + 90 + i: fro * 60 + i for i in range(5)}
    assert byte_moves(found) == expected
    assert all(batch.by_kernel == bool(kernel_below_bytes) for batch in found)
    assert all(len(set(batch.sizes.tolist())) == 1 for batch in found)


@pytest.mark.parametrize(
    ("address", "stride", "size", "offset", "expected"),
    [(32, 64, 64, 16, 16), (32, 200, 64, 16, 8), (40, 64, 64, 16, 8), (32, 64, 64, 24, 8), (32, 64, 36, 16, 1)],
)
def test_alignment_is_that_of_all_addresses_and_sizes(
    address: int, stride: int, size: int, offset: int, expected: int
) -> None:
    rows = Rows(address, stride), Rows(1 << 20, 1 << 12)
    for source, target in (rows, rows[::-1]):
        (batch,) = planned((1, 2), (4, 7), source=source, target=target, block_bytes=size, kernel_below_bytes=1 << 20)
        assert batch.alignment == (expected if offset == 16 else 16)
        pieces = (Piece(Extent(offset, size), Extent(0, size)),)
        (batch,) = planned((1, 2), (4, 7), pieces=pieces, source=source, target=target)
        assert batch.alignment == expected
