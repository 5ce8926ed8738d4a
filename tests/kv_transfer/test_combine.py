from __future__ import annotations

import pytest

from atom_cluster.errors import ProtocolError
from atom_cluster.kv_transfer.combine import ReportCombiner, merge_offers
from atom_cluster.messages.transfer import BlocksTagged, KvOffer, RankReport, ReadFinished


def read(rank: int, **fields: object) -> RankReport:
    return RankReport(rank=rank, report=ReadFinished(read_id=5, **fields))  # type: ignore[arg-type]


def tagged(rank: int, first_block: int, *tags: int, group: int = 0) -> RankReport:
    """Of what the reader's rank of the same number, of two, reads."""
    by_reader = tuple(tags if reader == rank else () for reader in range(2))
    report = BlocksTagged(ticket_id="t", first_block=first_block, tags=by_reader, group=group)
    return RankReport(rank=rank, report=report)


def test_a_read_is_over_only_when_every_rank_said_so_and_its_parts_add_up() -> None:
    combiner = ReportCombiner(3)
    assert combiner.add(read(2, bad_blocks=(4, 1), num_bytes=10, seconds=0.5)) is None
    assert combiner.add(read(0, num_bytes=20, seconds=0.25)) is None
    assert combiner.add(read(1, bad_blocks=(1, 0), num_bytes=30)) == ReadFinished(
        read_id=5, bad_blocks=(0, 1, 4), num_bytes=60, seconds=0.5
    )


def test_one_error_makes_the_read_an_error() -> None:
    combiner = ReportCombiner(3)
    combiner.add(read(1, error="peer gone"))
    combiner.add(read(0, num_bytes=20))
    combined = combiner.add(read(2, error="timeout"))
    assert isinstance(combined, ReadFinished)
    assert combined.error == "rank 1: peer gone; rank 2: timeout"


def test_tags_come_in_order_of_ranks_and_commands_do_not_mix() -> None:
    combiner = ReportCombiner(2)
    assert combiner.add(tagged(1, 0, 30, 40)) is None
    assert combiner.add(tagged(0, 2, 50)) is None
    assert combiner.add(tagged(1, 0, 7, group=1)) is None
    assert combiner.add(tagged(0, 0, 10, 20)) == BlocksTagged(ticket_id="t", first_block=0, tags=((10, 20), (30, 40)))
    assert combiner.add(tagged(1, 2, 60)) == BlocksTagged(ticket_id="t", first_block=2, tags=((50,), (60,)))
    assert combiner.add(tagged(0, 0, 6, group=1)) == BlocksTagged(
        ticket_id="t", first_block=0, tags=((6,), (7,)), group=1
    )


def test_tags_of_what_one_rank_reads_from_several_come_one_after_the_other() -> None:
    combiner = ReportCombiner(2)
    reports = [
        RankReport(rank=rank, report=BlocksTagged(ticket_id="t", first_block=0, tags=tags))
        for rank, tags in enumerate((((1, 2), (3, 4), ()), ((), (5, 6), (7, 8))))
    ]
    assert combiner.add(reports[1]) is None
    combined = combiner.add(reports[0])
    assert isinstance(combined, BlocksTagged)
    assert combined.tags == ((1, 2), (3, 4, 5, 6), (7, 8))


def test_an_id_can_be_used_again_once_it_is_over() -> None:
    combiner = ReportCombiner(1)
    assert combiner.add(read(0)) == combiner.add(read(0)) == ReadFinished(read_id=5)


def test_a_rank_that_reports_twice_or_does_not_exist_is_an_error() -> None:
    combiner = ReportCombiner(2)
    combiner.add(read(0))
    with pytest.raises(ProtocolError, match="twice"):
        combiner.add(read(0))
    with pytest.raises(ProtocolError, match="rank 2"):
        combiner.add(read(2))


def test_offers_are_those_that_all_ranks_make_in_rank_0s_order() -> None:
    ranks = [{"shm@host1": b"a0", "tcp": b"t0", "mori": b"m0"}, {"mori": b"m1", "tcp": b"t1", "shm@host2": b"a1"}]
    assert merge_offers(ranks) == (KvOffer("tcp", (b"t0", b"t1")), KvOffer("mori", (b"m0", b"m1")))
