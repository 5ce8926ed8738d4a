"""What the contract of transports does not say: descriptors, sockets, agents that go. Needs NIXL, no special device."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer import registry
from atom_cluster.kv_transfer.nixl import NixlDescriptor, NixlTransport, SealedDescriptor, _spans
from atom_cluster.kv_transfer.nixl_agent import Memory, NixlAgent, Pieces, Transfer, load_library
from atom_cluster.kv_transfer.nixl_fabric import Fabric, find_fabric
from atom_cluster.kv_transfer.nixl_reader import BlockLayout
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.registry import TransportSettings, open_transport
from atom_cluster.units import Deadline
from tests.kv_transfer.ranks import SECRET, Rank, exporter_elsewhere, make_regions, rank_here, wait_for, wait_until
from tests.processes import forking

pytestmark = pytest.mark.skipif(
    "nixl" in registry.missing("cpu"), reason=f"nixl: {registry.missing('cpu').get('nixl')}"
)

LARGE = (1 << 20,)
EMULATED = Fabric("emulated", "NET_DEVICES=lo,TLS=tcp")
"""What the transport never uses: reads that the peer answers with messages. With it a read can be kept from ending, by
a peer that is stopped; when such a peer goes on, it may abort."""


@pytest.fixture
def reader() -> Iterator[Rank]:
    with rank_here("nixl") as rank:
        yield rank


def test_a_descriptor_sealed_with_another_secret_is_refused(reader: Rank) -> None:
    with (
        rank_here("nixl", seed=7, secret=b"the secret of another cluster") as stranger,
        pytest.raises(TransferError, match="another secret"),
    ):
        reader.transport.connect("peer", stranger.descriptor)


def test_no_byte_of_a_descriptor_can_be_changed_before_ucx_sees_it(reader: Rank) -> None:
    with rank_here("nixl", seed=7) as exporter:
        for position in range(len(exporter.descriptor)):
            damaged = bytearray(exporter.descriptor)
            damaged[position] ^= 1
            with pytest.raises(TransferError):
                reader.transport.connect("peer", bytes(damaged))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(TransferError, match="16"):
        open_transport("nixl", TransportSettings(rank=0, host="127.0.0.1", secret=b"short"))


def test_every_incarnation_names_itself_differently_and_a_descriptor_names_the_regions(reader: Rank) -> None:
    with rank_here("nixl", seed=7) as other:
        ours, theirs = (unsealed(rank.descriptor) for rank in (reader, other))
    assert ours.metadata != theirs.metadata
    assert [region.shape.name for region in ours.regions] == [region.name for region in reader.regions]
    assert (ours.rank, ours.memory_kind, ours.device) == (0, "DRAM", 0)


def unsealed(descriptor: bytes) -> NixlDescriptor:
    return msgspec.msgpack.decode(msgspec.msgpack.decode(descriptor, type=SealedDescriptor).body, type=NixlDescriptor)


def test_automatic_choice_does_not_take_it() -> None:
    with pytest.raises(TransferError, match="has to be named"):
        open_transport("nixl", TransportSettings(rank=0, host="127.0.0.1", secret=SECRET, is_named=False))


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc")
def test_it_listens_on_the_loopback_address_only() -> None:
    before = listening()
    with rank_here("nixl"):
        ours = listening() - before
    assert ours
    assert {address for address, _ in ours} == {"127.0.0.1"}


def listening() -> set[tuple[str, int]]:
    """Addresses and ports that this process listens on."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # as the descriptor of the listing itself is
            inodes.add(os.readlink(f"/proc/self/fd/{name}"))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, _, port = fields[1].partition(":")
                raw = bytes.fromhex(address)
                words = b"".join(
                    raw[i : i + 4][:: -1 if sys.byteorder == "little" else 1] for i in range(0, len(raw), 4)
                )
                family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
                found.add((socket.inet_ntop(family, words), int(port, 16)))
    return found


def test_an_idle_rank_leaves_the_processor_alone() -> None:
    with rank_here("nixl"):
        before = os.times()
        wait_until(lambda: os.times().elapsed - before.elapsed > 1.0)
        after = os.times()
    # The wait itself takes a little.
    assert after.user + after.system - before.user - before.system < 0.5


def test_a_peer_that_restarted_is_read_from_by_its_new_descriptor_and_not_by_the_old_one(reader: Rank) -> None:
    with exporter_elsewhere("nixl", seed=7) as first:
        reader.transport.connect("engine/1", first.descriptor)
        assert reader.read(1, "engine/1", (0,), (0,)).error is None
        old = first.descriptor
    with exporter_elsewhere("nixl", seed=8) as second:
        reader.transport.connect("engine/2", second.descriptor)
        assert reader.read(2, "engine/1", (1,), (1,)).error is not None
        assert reader.read(3, "engine/2", (2,), (2,)).error is None
        assert torch.equal(reader.regions[0].blocks[2], second.regions[0].blocks[2])
        reader.transport.disconnect("engine/1")
        reader.transport.connect("engine/1", old)
        assert reader.read(4, "engine/1", (3,), (3,)).error is not None
        assert not reader.regions[0].blocks[[1, 3]].any()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_reader_that_ends_in_the_middle_does_not_take_its_peer_along(reader: Rank, number: signal.Signals) -> None:
    with exporter_elsewhere("nixl", num_blocks=8, block_bytes=LARGE) as exporter:
        for _ in range(3):
            end_in_the_middle_of_a_read(exporter.descriptor, number)
        with rank_here("nixl", num_blocks=16, block_bytes=LARGE) as other:
            other.transport.connect("peer", exporter.descriptor)
            assert other.read(1, "peer", (5,), (1,)).error is None


def end_in_the_middle_of_a_read(descriptor: bytes, number: signal.Signals) -> None:
    context = forking()
    ours, theirs = context.Pipe()
    process = context.Process(target=_read_on_and_on, args=(theirs, descriptor), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(200)
    os.kill(process.pid or 0, number)
    process.join()
    ours.close()


def _read_on_and_on(connection: Connection, descriptor: bytes) -> None:
    with rank_here("nixl", num_blocks=8, block_bytes=LARGE) as rank:
        rank.transport.connect("peer", descriptor)
        assert rank.read(0, "peer", (0,), (0,)).error is None
        blocks = tuple(range(7, -1, -1)) * 4000
        rank.transport.start_read(1, "peer", 0, blocks, blocks, Deadline.after(60))
        connection.send(None)
        connection.poll(None)


def test_what_a_stopped_peer_sends_after_the_deadline_is_not_written() -> None:
    (region,) = make_regions(num_blocks=16, block_bytes=LARGE, seed=None)
    with (
        exporter_elsewhere("nixl", num_blocks=8, block_bytes=LARGE) as exporter,
        closing(NixlTransport(rank=0, secret=SECRET, fabric=EMULATED)) as transport,
    ):
        reader = Rank(transport, (region,), transport.export((region,)))
        transport.connect("peer", exporter.descriptor)
        assert reader.read(0, "peer", (0,), (8,)).error is None
        exporter.signal(signal.SIGSTOP)
        blocks = tuple(range(8))
        transport.start_read(1, "peer", 0, blocks, blocks, Deadline.after(0.3))
        (completion,) = wait_for(transport, 1)
        assert completion.error == "the deadline passed"
        region.blocks[:8] = 0
        exporter.signal(signal.SIGCONT)
        begun = time.monotonic()
        wait_until(lambda: time.monotonic() - begun > 0.5)
        assert not region.blocks[:8].any()


def test_where_memory_could_only_be_read_by_emulation_reads_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    with rank_here("nixl", seed=7) as exporter, rank_here("nixl") as reader:
        reader.transport.connect("peer", exporter.descriptor)
        assert reader.read(1, "peer", (0,), (0,)).error is not None
        assert not reader.regions[0].blocks.any()


# --- the agent ----------------------------------------------------------------------------------------------------


def make_agent(name: str, blocks: torch.Tensor, fabric: Fabric | None = None) -> NixlAgent:
    spans = [(blocks.data_ptr(), blocks.numel() * blocks.element_size())]
    return NixlAgent(name, spans=spans, memory=Memory.of(blocks.device), fabric=fabric or find_fabric())


def pieces(to: torch.Tensor, fro: torch.Tensor) -> Pieces:
    return Pieces(*(np.array([value], dtype=np.uint64) for value in (to.data_ptr(), fro.data_ptr(), to.numel())))


def test_regions_that_only_touch_are_registered_one_by_one() -> None:
    apart = [BlockLayout(4096, 512, 512), BlockLayout(4096 + 8 * 512, 256, 256)]
    assert _spans(apart, [8, 4]) == [(4096, 8 * 512), (4096 + 8 * 512, 4 * 256)], "may be two allocations of a GPU"
    interleaved = [BlockLayout(4096 + 64, 256, 100), BlockLayout(4096, 256, 64)]
    assert _spans(interleaved, [8, 8]) == [(4096, 7 * 256 + 164)]


def test_memory_outside_of_what_was_registered_cannot_be_read() -> None:
    source, target = torch.ones(4096, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)
    exporter, agent = make_agent("exporter", source[:2048]), make_agent("reader", target)
    try:
        name = agent.connect(exporter.metadata)
        with pytest.raises(TransferError, match="NOT_FOUND"):
            agent.post(name, Memory("DRAM", 0), pieces(target[2048:], source[2048:]))
    finally:
        agent.close()
        exporter.close()
    assert not target.any()


def test_a_closed_agent_is_gone_though_transfers_were_under_way() -> None:
    source, target = torch.ones(1 << 20, dtype=torch.uint8), torch.zeros(1 << 20, dtype=torch.uint8)
    exporter, agent = make_agent("exporter", source), make_agent("reader", target, EMULATED)
    before = len(os.listdir("/proc/self/fd"))
    name = agent.connect(exporter.metadata)
    # The exporter makes no progress, so this cannot end.
    transfers = [agent.post(name, Memory("DRAM", 0), pieces(target, source)) for _ in range(4)]
    assert not agent.is_over(transfers[0])
    agent.close()
    agent.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < before
    exporter.close()
    assert not target.any()


def test_an_agent_that_somebody_still_holds_cannot_be_closed() -> None:
    agent = make_agent("reader", torch.zeros(4096, dtype=torch.uint8))
    held = agent._agent
    with pytest.raises(TransferError, match="still in use"):
        agent.close()
    del held


def test_states_other_than_success_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent("reader", torch.zeros(4096, dtype=torch.uint8))
    try:
        monkeypatch.setattr(agent._agent, "check_xfer_state", lambda handle: "ERR", raising=False)
        with pytest.raises(TransferError, match="state ERR"):
            agent.is_over(Transfer(handle=None))
    finally:
        monkeypatch.undo()
        agent.close()


def test_an_unusable_interface_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "nonsense")
    monkeypatch.setenv("UCX_TLS", "tcp")
    with pytest.raises(TransferError, match="cannot use UCX"):
        make_agent("reader", torch.zeros(4096, dtype=torch.uint8))


def test_the_library_does_not_write_to_the_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    load_library()
    logger = logging.getLogger("nixl")
    assert (logger.handlers, logger.propagate) == ([], True)
    make_agent("reader", torch.zeros(4096, dtype=torch.uint8)).close()
    assert capfd.readouterr().out == ""


def test_regions_need_contiguous_blocks() -> None:
    transport = open_transport("nixl", TransportSettings(rank=0, host="127.0.0.1", secret=SECRET))
    blocks = torch.zeros(4, 8, 8, dtype=torch.uint8).transpose(1, 2)
    with pytest.raises(TransferError, match="contiguous"):
        transport.export((KvRegion("only", blocks),))
    transport.close()
