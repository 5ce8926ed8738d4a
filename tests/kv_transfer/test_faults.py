"""Deliberate faults happen, and are noticed by those who are there to notice them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pytest
import torch

from atom_cluster.config.faults import FaultsConfig
from atom_cluster.kv_transfer.agent import open_agent
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.messages.transfer import BlocksTagged, ConnectPeer, ReadBlocks, ReadFinished, TagBlocks
from tests.kv_transfer.ranks import SECRET, make_regions
from tests.kv_transfer.test_agent import PLACEMENT, Engine, opaque

SETTINGS = TransportSettings(rank=0, host="127.0.0.1", secret=SECRET)
EPOCH = 5


@pytest.fixture
def prefill() -> Iterator[Engine]:
    regions = make_regions(num_blocks=16, block_bytes=(200,), seed=3)
    agent, _ = open_agent("tcp", regions=regions, pages=opaque((200,)), settings=SETTINGS)
    yield Engine(agent, regions)
    agent.close()


@pytest.fixture
def decode(faults: FaultsConfig) -> Iterator[Engine]:
    regions = make_regions(num_blocks=16, block_bytes=(200,), seed=None)
    agent, _ = open_agent(
        "tcp", regions=regions, pages=opaque((200,)), settings=dataclasses.replace(SETTINGS, faults=faults)
    )
    yield Engine(agent, regions)
    agent.close()


def read(prefill: Engine, decode: Engine) -> ReadFinished:
    """Blocks 0 to 3, with their tags."""
    blocks = (0, 1, 2, 3)
    prefill.agent.execute([TagBlocks(ticket_id="t", epoch=EPOCH, first_block=0, block_ids=blocks, reader=PLACEMENT)])
    (tagged,) = prefill.reports(1)
    assert isinstance(tagged, BlocksTagged)
    offer = next(iter(prefill.agent.descriptors.items()))
    decode.agent.execute([ConnectPeer(peer="p", transport=offer[0], descriptors=(offer[1],), placement=PLACEMENT)])
    return decode.read(
        ReadBlocks(
            read_id=1,
            peer="p",
            remote_block_ids=blocks,
            local_block_ids=blocks,
            tags=tagged.tags,
            epoch=EPOCH,
            timeout_s=20.0,
        )
    )


@pytest.mark.parametrize("faults", [FaultsConfig(corrupt_reads=1.0)])
def test_a_damaged_block_is_found_by_its_tag_and_no_other_is_blamed(prefill: Engine, decode: Engine) -> None:
    report = read(prefill, decode)
    assert report.error is None and len(report.bad_blocks) == 1
    (bad,) = report.bad_blocks
    same = [torch.equal(decode.regions[0].blocks[i], prefill.regions[0].blocks[i]) for i in range(4)]
    assert same == [index != bad for index in range(4)]


@pytest.mark.parametrize("faults", [FaultsConfig(delay_reads_s=0.3)])
def test_a_slow_read_ends_late_and_well(prefill: Engine, decode: Engine) -> None:
    began_s = time.monotonic()
    report = read(prefill, decode)
    assert report.error is None and report.bad_blocks == ()
    assert time.monotonic() - began_s >= 0.3


@pytest.mark.parametrize("faults", [FaultsConfig()])
def test_nothing_configured_is_nothing_done(prefill: Engine, decode: Engine) -> None:
    report = read(prefill, decode)
    assert report.error is None and report.bad_blocks == ()
    assert torch.equal(decode.regions[0].blocks[:4], prefill.regions[0].blocks[:4])
