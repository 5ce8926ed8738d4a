from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_cache.page_map import opaque_page
from atom_cluster.kv_transfer import agent as agent_module
from atom_cluster.kv_transfer import registry
from atom_cluster.kv_transfer.agent import KvAgent, PageFacts, open_agent
from atom_cluster.kv_transfer.pieces import PeerShape, Piece
from atom_cluster.kv_transfer.protocol import KvRegion, ReadCompletion
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.messages.transfer import (
    BlocksTagged,
    ConnectPeer,
    DropPeer,
    KvOffer,
    KvPlacement,
    KvReport,
    RankReport,
    ReadBlocks,
    ReadFinished,
    TagBlocks,
)
from atom_cluster.units import Deadline
from tests.kv_transfer.ranks import SECRET, make_regions, wait_until

EPOCH = 99
PLACEMENT = KvPlacement(16, 1)


def settings(rank: int = 0) -> TransportSettings:
    return TransportSettings(rank=rank, host="127.0.0.1", secret=SECRET)


@dataclasses.dataclass
class Engine:
    """An agent with its memory, and the means to talk to it."""

    agent: KvAgent
    regions: tuple[KvRegion, ...]

    def reports(self, count: int, timeout_s: float = 20) -> list[KvReport]:
        found: list[KvReport] = []

        def has_all() -> bool:
            found.extend(report.report for report in self.agent.poll())
            return len(found) >= count

        wait_until(has_all, timeout_s)
        return found

    def tags(self, block_ids: tuple[int, ...], group: int = 0) -> tuple[int, ...]:
        self.agent.execute(
            [TagBlocks(ticket_id="t", epoch=EPOCH, first_block=0, block_ids=block_ids, reader=PLACEMENT, group=group)]
        )
        (report,) = self.reports(1)
        assert isinstance(report, BlocksTagged)
        assert report.group == group
        return report.tags[0]

    def read(self, command: ReadBlocks) -> ReadFinished:
        self.agent.execute([command])
        (report,) = self.reports(1)
        assert isinstance(report, ReadFinished)
        return report


SIZES = (64, 200, 4096)


def opaque(sizes: tuple[int, ...] = SIZES, world_size: int = 1) -> PageFacts:
    """Pages that both sides lay out in the same way."""
    maps = tuple(opaque_page(size) for size in sizes)
    return PageFacts(maps=maps, placement=msgspec.structs.replace(PLACEMENT, world_size=world_size))


@pytest.fixture(params=["shm", "tcp", "auto"])
def choice(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def engine(choice: str, seed: int | None, rank: int = 0, world_size: int = 1) -> Engine:
    regions = make_regions(num_blocks=16, block_bytes=SIZES, seed=seed)
    agent, _ = open_agent(choice, regions=regions, pages=opaque(world_size=world_size), settings=settings(rank))
    return Engine(agent, regions)


@pytest.fixture
def prefill(choice: str) -> Iterator[Engine]:
    made = engine(choice, seed=5)
    yield made
    made.agent.close()


@pytest.fixture
def decode(choice: str) -> Iterator[Engine]:
    made = engine(choice, seed=None)
    yield made
    made.agent.close()


def connect(prefill: Engine, peer: str = "peer") -> ConnectPeer:
    name = prefill.agent.transports[0]
    return ConnectPeer(peer=peer, transport=name, descriptors=(prefill.agent.descriptors[name],), placement=PLACEMENT)


def read_blocks(remote: tuple[int, ...], local: tuple[int, ...], tags: tuple[int, ...], group: int = 0) -> ReadBlocks:
    return ReadBlocks(
        read_id=1,
        group=group,
        peer="peer",
        epoch=EPOCH,
        remote_block_ids=remote,
        local_block_ids=local,
        tags=(tags,) if tags else (),
        timeout_s=20,
    )


def test_the_thread_that_waits_for_reads_wakes_on_time(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    monkeypatch.setattr(agent_module, "wake_on_time", lambda: threads.append(threading.current_thread().name))
    engine("shm", seed=None, rank=3).agent.close()
    assert threads == ["kv-agent-3"]


@pytest.mark.parametrize("group", range(len(SIZES)))
def test_blocks_are_tagged_read_and_found_good(prefill: Engine, decode: Engine, group: int) -> None:
    tags = prefill.tags((2, 3, 7), group)
    decode.agent.execute([connect(prefill), read_blocks((2, 3, 7), (0, 1, 9), tags, group)])
    (report,) = decode.reports(1)
    assert isinstance(report, ReadFinished)
    assert (report.error, report.bad_blocks, report.num_bytes) == (None, (), 3 * SIZES[group])
    for index, (target, origin) in enumerate(zip(decode.regions, prefill.regions, strict=True)):
        if index == group:
            assert torch.equal(target.blocks[[0, 1, 9]], origin.blocks[[2, 3, 7]])
        else:
            assert not target.blocks.any()


def test_blocks_that_changed_after_they_were_tagged_are_reported(prefill: Engine, decode: Engine) -> None:
    tags = prefill.tags((2, 3, 7, 8), 1)
    prefill.regions[1].blocks[3, 17] ^= 1
    prefill.regions[1].blocks[8, 0] ^= 128
    prefill.regions[2].blocks[7, 0] ^= 1
    decode.agent.execute([connect(prefill)])
    report = decode.read(read_blocks((2, 3, 7, 8), (0, 1, 2, 3), tags, 1))
    assert (report.error, report.bad_blocks) == (None, (1, 3))


def test_tags_of_another_epoch_or_order_do_not_match(prefill: Engine, decode: Engine) -> None:
    tags = prefill.tags((2, 3))
    decode.agent.execute([connect(prefill)])
    assert decode.read(msgspec.structs.replace(read_blocks((2, 3), (0, 1), tags), epoch=EPOCH + 1)).bad_blocks == (0, 1)
    assert decode.read(read_blocks((3, 2), (0, 1), tags)).bad_blocks == (0, 1)


def test_without_tags_nothing_is_checked(prefill: Engine, decode: Engine) -> None:
    decode.agent.execute([connect(prefill)])
    report = decode.read(read_blocks((2,), (0,), ()))
    assert (report.error, report.bad_blocks) == (None, ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peer": "nobody"}, "unknown peer"),
        ({"local_block_ids": (0,)}, "as many"),
        ({"local_block_ids": (4, 4)}, "distinct"),
        ({"tags": ((1,),)}, "one tag per block"),
        ({"remote_block_ids": (2, 16)}, "outside"),
        ({"local_block_ids": (-1, 3)}, "outside"),
        ({"group": 3}, "no group 3"),
        ({"timeout_s": 0.0}, "deadline"),
    ],
)
def test_a_read_that_cannot_be_done_ends_with_an_error(
    prefill: Engine, decode: Engine, changes: dict[str, object], message: str
) -> None:
    decode.agent.execute([connect(prefill)])
    assert message in str(decode.read(msgspec.structs.replace(read_blocks((2, 3), (0, 1), ()), **changes)).error)


def test_a_failed_connection_is_told_by_reads_and_may_be_tried_again(
    prefill: Engine, decode: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    good = connect(prefill)
    for bad in (
        msgspec.structs.replace(good, transport="pigeon"),
        msgspec.structs.replace(good, descriptors=()),
        msgspec.structs.replace(good, descriptors=(b"nonsense",)),
    ):
        decode.agent.execute([bad])
        assert "cannot connect" in str(decode.read(read_blocks((2,), (0,), ())).error)
    decode.agent.execute([good, good])
    assert decode.read(read_blocks((2,), (0,), ())).error is None
    assert "cannot read from peer" in caplog.text


def test_a_peer_that_the_best_transport_does_not_connect_is_read_through_the_next(
    prefill: Engine, decode: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    good = connect(prefill)
    offers = (KvOffer("pigeon", good.descriptors), KvOffer(good.transport, good.descriptors))
    decode.agent.execute([msgspec.structs.replace(good, descriptors=(b"nonsense",), others=offers)])
    assert decode.read(read_blocks((2,), (0,), ())).error is None
    assert f"cannot read from peer through {good.transport}: not a" in caplog.text
    assert "through pigeon: no transport 'pigeon' here" in caplog.text
    decode.agent.execute([DropPeer(peer="peer"), msgspec.structs.replace(good, transport="pigeon", others=offers[:1])])
    error = str(decode.read(read_blocks((2,), (0,), ())).error)
    assert error.startswith("cannot connect: ")
    assert error.count("no transport 'pigeon'") == 2


def test_a_dropped_peer_is_unknown(prefill: Engine, decode: Engine) -> None:
    decode.agent.execute([connect(prefill), DropPeer(peer="peer"), DropPeer(peer="nobody")])
    assert decode.read(read_blocks((2,), (0,), ())).error == "unknown peer"


def test_reports_name_their_rank_and_each_rank_uses_its_own_descriptor_and_tags() -> None:
    one, two = (engine("tcp", seed=seed, rank=1, world_size=2) for seed in (5, None))
    both = KvPlacement(16, 2)
    try:
        command = TagBlocks(ticket_id="t", epoch=EPOCH, first_block=0, block_ids=(4,), reader=both)
        one.agent.execute([command])
        (tagged,) = one.reports(1)
        assert isinstance(tagged, BlocksTagged)
        assert tagged.tags[0] == (), "rank 0 reads nothing from rank 1"
        tags = tagged.tags[1]
        two.agent.execute(
            [
                ConnectPeer(
                    peer="peer",
                    transport="tcp",
                    descriptors=(b"of rank 0", one.agent.descriptors["tcp"]),
                    placement=both,
                ),
                msgspec.structs.replace(read_blocks((4,), (4,), ()), tags=((12345,), tags)),
            ]
        )
        found: list[RankReport] = []

        def has_reported() -> bool:
            found.extend(two.agent.poll())
            return bool(found)

        wait_until(has_reported)
        report = found[0].report
        assert isinstance(report, ReadFinished)
        assert found[0].rank == 1
        assert (report.error, report.bad_blocks, report.num_bytes) == (None, (), SIZES[0])
    finally:
        one.agent.close()
        two.agent.close()


class ScriptedTransport:
    """A transport that ends reads only as it is told."""

    name = "scripted"

    def __init__(self) -> None:
        self.started: list[int] = []
        self.ended: list[ReadCompletion] = []
        self.is_closed = False

    def export(self, regions: tuple[KvRegion, ...]) -> bytes:
        return b""

    def connect(self, peer: str, descriptor: bytes, shape: PeerShape | None = None) -> None:
        pass

    def start_read(
        self,
        read_id: int,
        peer: str,
        group: int,
        remote_blocks: tuple[int, ...],
        local_blocks: tuple[int, ...],
        deadline: Deadline,
        pieces: tuple[Piece, ...] | None = None,
    ) -> None:
        self.started.append(read_id)

    def poll(self) -> list[ReadCompletion]:
        ended, self.ended = self.ended, []
        return ended

    def disconnect(self, peer: str) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def scripted() -> Iterator[tuple[ScriptedTransport, Engine]]:
    transport = ScriptedTransport()
    regions = make_regions(num_blocks=16, block_bytes=SIZES, seed=None)
    agent = KvAgent(rank=0, regions=regions, pages=opaque(), exports=[(transport, b"")])
    agent.execute([ConnectPeer(peer="peer", transport="scripted", descriptors=(b"",), placement=PLACEMENT)])
    yield transport, Engine(agent, regions)
    agent.close()


def fails(agent: KvAgent) -> Callable[[], bool]:
    def has_failed() -> bool:
        try:
            agent.poll()
        except TransferError:
            return True
        return False

    return has_failed


def test_an_error_of_the_transport_reaches_the_report(scripted: tuple[ScriptedTransport, Engine]) -> None:
    transport, engine = scripted
    engine.agent.execute([read_blocks((2,), (0,), ())])
    wait_until(lambda: transport.started == [1])
    transport.ended.append(ReadCompletion(1, "the link melted", 0, 0.0))
    (report,) = engine.reports(1)
    assert isinstance(report, ReadFinished)
    assert report.error == "the link melted"


def test_a_transport_that_never_ends_a_read_makes_the_rank_fail(
    scripted: tuple[ScriptedTransport, Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transport, engine = scripted
    monkeypatch.setattr(agent_module, "_GRACE_S", 0.05)
    with caplog.at_level(logging.CRITICAL):
        engine.agent.execute([msgspec.structs.replace(read_blocks((2,), (0,), ()), timeout_s=0.05)])
        wait_until(fails(engine.agent))
    with pytest.raises(TransferError, match="did not end"):
        engine.agent.execute([])
    assert transport.is_closed


def test_a_read_that_ends_twice_makes_the_rank_fail(scripted: tuple[ScriptedTransport, Engine]) -> None:
    transport, engine = scripted
    engine.agent.execute([read_blocks((2,), (0,), ())])
    wait_until(lambda: transport.started == [1])
    transport.ended.append(ReadCompletion(1, None, 1, 0.0))
    transport.ended.append(ReadCompletion(1, None, 1, 0.0))
    wait_until(fails(engine.agent))


def test_closing_twice_is_fine_and_closes_the_transport(scripted: tuple[ScriptedTransport, Engine]) -> None:
    transport, engine = scripted
    engine.agent.close()
    engine.agent.close()
    assert transport.is_closed


def test_auto_leaves_out_what_cannot_export_and_says_why() -> None:
    private = (KvRegion("private", torch.zeros(4, 64, dtype=torch.uint8)),)
    agent, reason = open_agent("auto", regions=private, pages=opaque((64,)), settings=settings())
    assert agent.transports == ("tcp",)
    assert "no shm: memory is private" in reason
    agent.close()
    with pytest.raises(TransferError, match="private"):
        open_agent("shm", regions=private, pages=opaque((64,)), settings=settings())


def test_transports_are_told_whether_they_were_named(monkeypatch: pytest.MonkeyPatch) -> None:
    named: dict[str, bool] = {}

    def refuse(name: str, settings: TransportSettings) -> None:
        named[name] = settings.is_named
        raise TransferError("not here")

    monkeypatch.setattr(registry, "open_transport", refuse)
    monkeypatch.setattr(registry, "missing", lambda device_type: {"pigeon": "not installed (homing)"})
    regions = make_regions(num_blocks=4, block_bytes=(64,), seed=None)
    with pytest.raises(TransferError, match="no shm: not here.*no pigeon: not installed"):
        open_agent("auto", regions=regions, pages=opaque((64,)), settings=settings())
    assert named
    assert not any(named.values())
    with pytest.raises(TransferError, match="not here"):
        open_agent("tcp", regions=regions, pages=opaque((64,)), settings=settings())
    assert named["tcp"]


def test_auto_prefers_shared_memory_and_names_it_after_the_host() -> None:
    made = engine("auto", seed=None)
    assert [name.partition("@")[0] for name in made.agent.transports] == ["shm", "tcp"]
    made.agent.close()
