from __future__ import annotations

import pytest
import torch

from atom_cluster.kv_cache.page_map import opaque_page
from atom_cluster.kv_transfer.agent import KvAgent, PageFacts, open_agent
from atom_cluster.kv_transfer.block_memory import VIEW_BYTES, block_memory
from atom_cluster.kv_transfer.pieces import Extent
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.messages.transfer import (
    BlocksTagged,
    ConnectPeer,
    KvPlacement,
    KvReport,
    ReadBlocks,
    ReadFinished,
    TagBlocks,
)
from tests.kv_transfer.ranks import SECRET, make_regions, wait_until

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
SIZES = (64, 200, (1 << 20) + 4096)
PLACEMENT = KvPlacement(16, 1)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_device])], ids=["host", "device"]
)
@pytest.mark.parametrize("order", [[3, 4, 5, 0, 9], list(range(12)), [11]])
def test_what_goes_out_of_some_blocks_lands_in_others(device: str, order: list[int]) -> None:
    source = regions_on(device, seed=3)
    target = regions_on(device, seed=None)
    local = [(block + 5) % 12 for block in order]
    others = [block for block in range(12) if block not in local]
    for group, (before, after) in enumerate(zip(source, target, strict=True)):
        chunks: list[bytes] = []
        for views in block_memory(source).outgoing(group, order):
            assert all(len(view) <= VIEW_BYTES for view in views)
            chunks.extend(bytes(view) for view in views)
        data = b"".join(chunks)
        assert data == before.blocks[order].cpu().numpy().tobytes()
        landing = block_memory(target).landing(group, local)
        offset = 0
        for view in landing.views():
            view[:] = data[offset : offset + len(view)]
            offset += len(view)
        landing.commit()
        assert torch.equal(after.blocks[local], before.blocks[order])
        assert not after.blocks[others].any()
        assert not any(region.blocks.any() for region in target[group + 1 :])


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_device])], ids=["host", "device"]
)
@pytest.mark.parametrize("order", [[3, 4, 5, 0, 9], list(range(12))])
def test_parts_of_blocks_land_in_other_parts_and_nothing_else_is_written(device: str, order: list[int]) -> None:
    source, target = regions_on(device, seed=3), regions_on(device, seed=None)
    there = (Extent(100_000, 3000, 40, 20_000), Extent(16, 8))
    here = (Extent(8, 3000, 40, 3000), Extent(VIEW_BYTES, 8))
    data = b"".join(bytes(view) for views in block_memory(source).outgoing(2, order, there) for view in views)
    assert len(data) == len(order) * 120_008
    landing = block_memory(target).landing(2, order, here)
    offset = 0
    for view in landing.views():
        view[:] = data[offset : offset + len(view)]
        offset += len(view)
    assert not target[2].blocks.any()
    landing.commit()
    expected = torch.zeros_like(target[2].blocks)
    for block in order:
        origin = source[2].blocks[block]
        runs = [origin[100_000 + i * 20_000 :][:3000] for i in range(40)]
        expected[block, 8 : 8 + 120_000] = torch.cat(runs)
        expected[block, VIEW_BYTES : VIEW_BYTES + 8] = origin[16:24]
    assert torch.equal(target[2].blocks, expected)


def regions_on(device: str, seed: int | None) -> tuple[KvRegion, ...]:
    regions = make_regions(num_blocks=12, block_bytes=SIZES, seed=seed)
    if device == "cpu":
        return regions
    return tuple(KvRegion(region.name, region.blocks.to(device).contiguous()) for region in regions)


def report_of(agent: KvAgent) -> KvReport:
    found: list[KvReport] = []

    def has_reported() -> bool:
        found.extend(report.report for report in agent.poll())
        return bool(found)

    wait_until(has_reported)
    return found[0]


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("choice", ["tcp", "ipc"])
def test_agents_move_blocks_between_device_memories_in_order_with_the_work_issued_before(choice: str) -> None:
    prefill, decode = regions_on("cuda", seed=None), regions_on("cuda", seed=None)
    truth = regions_on("cuda", seed=4)
    agents = [
        open_agent(
            choice,
            regions=regions,
            pages=PageFacts(maps=tuple(opaque_page(size) for size in SIZES), placement=PLACEMENT),
            settings=TransportSettings(rank=0, host="127.0.0.1", secret=SECRET),
        )[0]
        for regions in (prefill, decode)
    ]
    try:
        (transport,) = agents[0].transports
        for region, content in zip(prefill, truth, strict=True):
            region.blocks.copy_(content.blocks)
        torch.cuda.synchronize()  # tags are asked for when the step that wrote the blocks has given its result
        agents[0].execute(
            [TagBlocks(ticket_id="t", epoch=1, first_block=0, block_ids=(1, 2, 7), reader=PLACEMENT, group=2)]
        )
        tagged = report_of(agents[0])
        assert isinstance(tagged, BlocksTagged)

        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # a forward pass is still running when the read is ordered
        for region in decode:
            region.blocks.fill_(255)  # an earlier owner of the blocks; must not come after the read
        read = ReadBlocks(
            read_id=1,
            peer="p",
            epoch=1,
            group=2,
            remote_block_ids=(1, 2, 7),
            local_block_ids=(4, 5, 0),
            tags=tagged.tags,
            timeout_s=20,
        )
        descriptor = agents[0].descriptors[transport]
        connect = ConnectPeer(peer="p", transport=transport, descriptors=(descriptor,), placement=PLACEMENT)
        agents[1].execute([connect, read])
        finished = report_of(agents[1])
        assert isinstance(finished, ReadFinished)
        assert (finished.error, finished.bad_blocks, finished.num_bytes) == (None, (), 3 * SIZES[2])
        assert torch.equal(decode[2].blocks[[4, 5, 0]], truth[2].blocks[[1, 2, 7]])
    finally:
        for agent in agents:
            agent.close()
