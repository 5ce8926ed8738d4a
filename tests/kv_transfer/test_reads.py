"""Agents of engines that lay out KV differently: what is read, from whom, and whether damage is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_cache.page_map import PageMap, PagePart, RowSection
from atom_cluster.kv_transfer.agent import KvAgent, PageFacts, open_agent
from atom_cluster.kv_transfer.combine import ReportCombiner
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.reads import parts_of_read
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.kv_transfer.routes import RoutePlanner
from atom_cluster.kv_transfer.shared_memory import allocate_shared
from atom_cluster.messages.transfer import (
    BlocksTagged,
    ConnectPeer,
    KvPlacement,
    ReadBlocks,
    ReadFinished,
    Report,
    TagBlocks,
)
from tests.kv_transfer.ranks import SECRET, wait_until

PAGES = PageMap(
    (
        PagePart((RowSection(4, 16, is_divided=True),), 1),
        PagePart((RowSection(1, 24, is_divided=False),), 1),
    )
)
"""Four heads of 16 bytes and a latent of 24, per token."""
NUM_BLOCKS = 8
EPOCH = 3


@dataclass
class Gang:
    """The agents of an engine."""

    placement: KvPlacement
    agents: list[KvAgent]
    blocks: list[torch.Tensor]

    def run(self, *commands: TagBlocks | ReadBlocks | ConnectPeer) -> Report:
        """The combined report on the last of them."""
        combiner, found = ReportCombiner(len(self.agents)), []
        for agent in self.agents:
            agent.execute(commands)

        def is_over() -> bool:
            for agent in self.agents:
                found.extend(filter(None, map(combiner.add, agent.poll())))
            return bool(found)

        wait_until(is_over)
        return found[0]

    def fill(self) -> None:
        """Every token's bytes say which token and head it is, whichever rank has them."""
        for rank, blocks in enumerate(self.blocks):
            for block in range(NUM_BLOCKS):
                tokens = range(block * self.placement.block_size, (block + 1) * self.placement.block_size)
                heads = PAGES.parts[0].sections[0].share(rank, self.placement.world_size)
                content = [bytes([(7 * token + head) % 251] * 16) for token in tokens for head in heads]
                content += [bytes([(11 * token + 101) % 251] * 24) for token in tokens]
                row = torch.frombuffer(bytearray(b"".join(content)), dtype=torch.uint8)
                blocks[block, : len(row)] = row


@pytest.fixture
def gangs() -> Iterator[list[Gang]]:
    made: list[Gang] = []
    yield made
    for gang in made:
        for agent in gang.agents:
            agent.close()


def open_gang(gangs: list[Gang], transport: str, placement: KvPlacement) -> Gang:
    gang = Gang(placement, [], [])
    gangs.append(gang)
    for rank in range(placement.world_size):
        size = PAGES.page_bytes(rank, placement.world_size, placement.block_size)
        blocks = allocate_shared(NUM_BLOCKS * size).view(NUM_BLOCKS, size)
        agent, _ = open_agent(
            transport,
            regions=(KvRegion("0 full", blocks),),
            pages=PageFacts(maps=(PAGES,), placement=placement),
            settings=TransportSettings(rank=rank, host="127.0.0.1", secret=SECRET),
        )
        gang.agents.append(agent)
        gang.blocks.append(blocks)
    return gang


def connect(prefill: Gang) -> ConnectPeer:
    name = prefill.agents[0].transports[0]
    return ConnectPeer(
        peer="p",
        transport=name,
        descriptors=tuple(agent.descriptors[name] for agent in prefill.agents),
        placement=prefill.placement,
    )


def tagged_by(prefill: Gang, decode: Gang, block_ids: tuple[int, ...], first_block: int) -> BlocksTagged:
    report = prefill.run(
        TagBlocks(ticket_id="t", epoch=EPOCH, first_block=first_block, block_ids=block_ids, reader=decode.placement)
    )
    assert isinstance(report, BlocksTagged)
    return report


def read_all(prefill: Gang, decode: Gang) -> ReadFinished:
    """The first 32 tokens, into blocks of the same numbers, as one publication."""
    remote = tuple(range(32 // prefill.placement.block_size))
    local = tuple(range(32 // decode.placement.block_size))
    report = decode.run(
        connect(prefill),
        ReadBlocks(
            read_id=1,
            peer="p",
            epoch=EPOCH,
            remote_block_ids=remote,
            local_block_ids=local,
            tags=tagged_by(prefill, decode, remote, 0).tags,
            timeout_s=20,
        ),
    )
    assert isinstance(report, ReadFinished)
    return report


PLACEMENTS = (
    (KvPlacement(16, 1), KvPlacement(8, 2)),
    (KvPlacement(8, 4), KvPlacement(16, 2)),
    (KvPlacement(8, 2), KvPlacement(8, 8)),
    (KvPlacement(16, 8), KvPlacement(4, 1)),
)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(("there", "here"), PLACEMENTS)
def test_every_rank_reads_its_own_part_and_finds_it_good(
    gangs: list[Gang], transport: str, there: KvPlacement, here: KvPlacement
) -> None:
    prefill, decode, truth = (open_gang(gangs, transport, placement) for placement in (there, here, here))
    prefill.fill()
    truth.fill()
    report = read_all(prefill, decode)
    assert (report.error, report.bad_blocks) == (None, ())
    num_blocks = 32 // here.block_size
    for found, expected in zip(decode.blocks, truth.blocks, strict=True):
        assert torch.equal(found[:num_blocks], expected[:num_blocks])
        assert not found[num_blocks:].any()
    heads = 4 if here.world_size <= 4 else here.world_size
    assert report.num_bytes == 32 * (16 * heads + 24 * here.world_size)


@pytest.mark.parametrize(("there", "here"), PLACEMENTS)
def test_what_changed_after_it_was_tagged_makes_the_blocks_bad_that_have_it(
    gangs: list[Gang], there: KvPlacement, here: KvPlacement
) -> None:
    prefill, decode = (open_gang(gangs, "shm", placement) for placement in (there, here))
    prefill.fill()
    remote = tuple(range(32 // there.block_size))
    tags = tagged_by(prefill, decode, remote, 0).tags
    for blocks in prefill.blocks:
        blocks[1, 0] ^= 1  # the first head of the first token of block 1, on each rank
    report = decode.run(
        connect(prefill),
        ReadBlocks(
            read_id=1,
            peer="p",
            epoch=EPOCH,
            remote_block_ids=remote,
            local_block_ids=tuple(range(32 // here.block_size)),
            tags=tags,
            timeout_s=20,
        ),
    )
    assert isinstance(report, ReadFinished)
    assert (report.error, report.bad_blocks) == (None, (there.block_size // here.block_size,))


def test_only_tokens_that_both_lists_of_blocks_have_are_read(gangs: list[Gang]) -> None:
    prefill, decode, truth = (open_gang(gangs, "shm", KvPlacement(size, 1)) for size in (16, 4, 4))
    prefill.fill()
    truth.fill()
    tags = tagged_by(prefill, decode, (1, 2), 1).tags
    assert len(tags[0]) == 8
    # Tokens 16 to 47 are published, and 24 to 43 are lacking.
    report = decode.run(
        connect(prefill),
        ReadBlocks(
            read_id=1,
            peer="p",
            epoch=EPOCH,
            remote_block_ids=(1, 2),
            local_block_ids=(7, 6, 5, 4, 3),
            first_remote_block=1,
            first_local_block=6,
            tags=tags,
            timeout_s=20,
        ),
    )
    assert isinstance(report, ReadFinished)
    assert (report.error, report.bad_blocks, report.num_bytes) == (None, (), 20 * (64 + 24))
    assert not decode.blocks[0][:3].any()
    expected = truth.blocks[0]
    assert torch.equal(decode.blocks[0][7], expected[6]) and torch.equal(decode.blocks[0][6], expected[7])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 1}, "no group 1"),
        ({"local_block_ids": (2, 2)}, "distinct"),
        ({"tags": ((1, 2, 3),)}, "one tag per block"),
    ],
)
def test_commands_that_cannot_be_carried_out_say_why(changes: dict[str, object], message: str) -> None:
    command = ReadBlocks(
        read_id=1, peer="p", epoch=EPOCH, remote_block_ids=(1,), local_block_ids=(1, 2), tags=(), timeout_s=1
    )
    parts = parts_of_read(command, RoutePlanner([PAGES]), source=KvPlacement(8, 1), own=KvPlacement(4, 1), rank=0)
    assert [part.local_blocks for part in parts] == [(1,), (2,)]
    with pytest.raises(TransferError, match=message):
        parts_of_read(
            msgspec.structs.replace(command, **changes),
            RoutePlanner([PAGES]),
            source=KvPlacement(8, 1),
            own=KvPlacement(4, 1),
            rank=0,
        )
