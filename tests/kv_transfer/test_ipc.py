"""The ipc transport beyond the contract: what it does while copies are under way. Mostly over a stand-in for a GPU."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from atom_cluster.errors import TransferError
from atom_cluster.kv_transfer import ipc, ipc_copies
from atom_cluster.kv_transfer.ipc import IpcTransport
from atom_cluster.kv_transfer.ipc_device import SharedAllocation, open_gpu
from atom_cluster.kv_transfer.ipc_driver import HANDLE_BYTES
from atom_cluster.kv_transfer.ipc_export import SeenMark, decode
from atom_cluster.kv_transfer.pieces import Extent, PeerShape, Piece
from atom_cluster.kv_transfer.protocol import KvRegion
from atom_cluster.kv_transfer.shared_memory import allocate_shared
from atom_cluster.units import Deadline
from tests.kv_transfer.ipc_stand_in import HostDevice
from tests.kv_transfer.ranks import Rank, exporter_elsewhere, make_regions, rank_here, wait_for, wait_until

BLOCK = 4096
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device")
needs_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two devices")


@dataclass
class Host:
    """A rank over a stand-in."""

    device: HostDevice = field(default_factory=HostDevice)
    rank: int = 0
    num_blocks: int = 16
    block_bytes: tuple[int, ...] = (BLOCK,)
    seed: int | None = None
    kernel_below_bytes: int = 0
    regions: tuple[KvRegion, ...] = ()
    descriptor: bytes = b""

    def __post_init__(self) -> None:
        self.transport = IpcTransport(
            rank=self.rank, open_device=lambda _: self.device, kernel_below_bytes=self.kernel_below_bytes
        )
        self.regions = make_regions(num_blocks=self.num_blocks, block_bytes=self.block_bytes, seed=self.seed)
        self.descriptor = self.transport.export(self.regions)

    def start(self, read_id: int, remote: tuple[int, ...], local: tuple[int, ...]) -> None:
        self.transport.start_read(read_id, "peer", 0, remote, local, Deadline.after(20))

    def finish_copies(self) -> None:
        for fence in self.device.fences:
            fence.is_done = True


@pytest.fixture
def source() -> Iterator[Host]:
    host = Host(seed=3)
    yield host
    host.transport.close()


@pytest.fixture
def reader(source: Host) -> Iterator[Host]:
    """Connected; its copies are under way until `finish_copies`."""
    host = Host(HostDevice(holds=True))
    host.transport.connect("peer", source.descriptor)
    yield host
    host.transport.close()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two blocks, two batches under way at most."""
    monkeypatch.setattr(ipc_copies, "BATCH_BYTES", 2 * BLOCK)
    monkeypatch.setattr(ipc, "_WINDOW_BYTES", 4 * BLOCK)


def test_a_read_ends_when_the_device_has_done_all_of_it(reader: Host, source: Host) -> None:
    reader.start(1, (1, 5), (2, 3))
    assert reader.transport.poll() == []
    reader.finish_copies()
    (completion,) = reader.transport.poll()
    assert (completion.read_id, completion.error, completion.num_bytes) == (1, None, 2 * BLOCK)
    assert torch.equal(reader.regions[0].blocks[[2, 3]], source.regions[0].blocks[[1, 5]])


@pytest.mark.usefixtures("small_batches")
def test_the_device_is_given_a_bounded_number_of_bytes_at_a_time(reader: Host, source: Host) -> None:
    reader.start(1, tuple(range(9)), tuple(range(9)))
    reader.start(2, (15,), (15,))
    given = []
    for _ in range(4):
        assert [done.read_id for done in reader.transport.poll()] == []
        given.append(sum(batch.num_bytes for batch in reader.device.batches) // BLOCK)
        if given[-1] == 10:
            break
        reader.device.fences[0].is_done = True
    assert given == [4, 6, 8, 10], "a batch more for each that is done"
    reader.finish_copies()
    assert {done.read_id for done in reader.transport.poll()} == {1, 2}
    assert torch.equal(reader.regions[0].blocks[:9], source.regions[0].blocks[:9])


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("end", ["deadline", "disconnect"])
def test_a_read_that_has_to_end_waits_for_its_copies_and_gets_no_more(reader: Host, end: str) -> None:
    reader.start(1, tuple(range(12)), tuple(range(12)))
    reader.transport.poll()
    if end == "disconnect":
        reader.transport.disconnect("peer")
    else:
        reader.transport._reads[1].deadline = Deadline.after(0)
    reader.device.fences[0].is_done = True
    assert reader.transport.poll() == []
    assert reader.transport.poll() == []
    reader.finish_copies()
    (completion,) = reader.transport.poll()
    assert end in str(completion.error)
    assert completion.num_bytes == 0
    assert sum(batch.num_bytes for batch in reader.device.batches) == 4 * BLOCK


def test_a_peers_memory_stays_mapped_until_the_copies_out_of_it_are_done() -> None:
    with exporter_elsewhere("ipc/stand-in", block_bytes=(BLOCK,)) as exporter:
        reader = Host(HostDevice(holds=True))
        reader.transport.connect("peer", exporter.descriptor)
        reader.transport.connect("the same under another name", exporter.descriptor)
        assert reader.device.num_maps == 1
        reader.start(1, (4,), (5,))
        reader.transport.poll()
        reader.transport.disconnect("the same under another name")
        reader.transport.disconnect("peer")
        assert len(reader.device.mapped) == 1
        reader.transport.connect("peer", exporter.descriptor)
        assert reader.device.num_maps == 1, "and again in use, it was not given up"
        reader.finish_copies()
        assert [done.error for done in reader.transport.poll()] == ["disconnected"]
        assert len(reader.device.mapped) == 1
        reader.transport.disconnect("peer")
        assert not reader.device.mapped
        reader.transport.close()
        assert reader.device.is_closed


def test_closing_waits_for_copies_before_it_unmaps() -> None:
    with exporter_elsewhere("ipc/stand-in", block_bytes=(BLOCK,)) as exporter:
        reader = Host(HostDevice(holds=True))
        reader.transport.connect("peer", exporter.descriptor)
        reader.start(1, (4,), (5,))
        reader.transport.poll()
        (fence,) = reader.device.fences
        reader.transport.close()
        assert fence.is_done
        assert not reader.device.mapped


def test_a_restarted_peer_is_refused_under_its_old_descriptor() -> None:
    reader = Host()
    with exporter_elsewhere("ipc/stand-in", block_bytes=(BLOCK,)) as exporter:
        reader.transport.connect("peer", exporter.descriptor)
    reader.start(1, (0,), (0,))
    assert "gone" in str(wait_for(reader.transport, 1)[0].error)
    assert not reader.device.mapped, "nobody disconnects from the dead"
    with exporter_elsewhere("ipc/stand-in", block_bytes=(BLOCK,)) as successor:
        with pytest.raises(TransferError):
            reader.transport.connect("peer", exporter.descriptor)
        reader.transport.connect("peer", successor.descriptor)
        reader.start(2, (0,), (0,))
        assert wait_for(reader.transport, 1)[0].error is None
        reader.transport.close()


def test_memory_that_was_withdrawn_is_not_read_any_more(source: Host) -> None:
    reader = Host()
    reader.transport.connect("peer", source.descriptor)
    reader.start(1, (0,), (0,))
    source.transport.close()
    (completion,) = wait_for(reader.transport, 1)
    assert "withdrawn" in str(completion.error)
    with pytest.raises(TransferError):
        reader.transport.connect("peer", source.descriptor)
    reader.transport.close()


def test_memory_of_the_same_process_lives_as_long_as_it_is_read_and_no_longer() -> None:
    source, reader = Host(), Host(HostDevice(holds=True))
    reader.transport.connect("peer", source.descriptor)
    assert reader.device.num_maps == 0, "no process can open its own handles"
    memory = weakref.ref(source.regions[0].blocks.untyped_storage())
    reader.start(1, (0,), (0,))
    reader.transport.poll()
    source.transport.close()
    source.regions = ()
    gc.collect()
    assert memory() is not None
    reader.finish_copies()
    wait_for(reader.transport, 1)
    reader.transport.close()
    del source
    gc.collect()
    assert memory() is None


def test_ranks_of_one_process_on_two_devices_are_refused(source: Host) -> None:
    reader = Host(HostDevice(uuid="another"))
    with pytest.raises(TransferError, match="one device"):
        reader.transport.connect("peer", source.descriptor)
    reader.transport.close()


def test_a_changed_descriptor_is_refused_wherever_it_was_changed(reader: Host, source: Host) -> None:
    for position in range(len(source.descriptor)):
        changed = bytearray(source.descriptor)
        changed[position] ^= 1
        with pytest.raises(TransferError):
            reader.transport.connect("another", bytes(changed))


def test_a_copy_that_the_device_refuses_fails_its_read_alone(reader: Host) -> None:
    reader.device.refuses = "invalid argument (1)"
    reader.start(1, (0,), (0,))
    assert reader.transport.poll() == []
    reader.device.refuses = ""
    reader.start(2, (0,), (0,))
    assert reader.transport.poll() == []
    reader.finish_copies()
    assert {done.read_id: done.error for done in reader.transport.poll()} == {1: "invalid argument (1)", 2: None}


def test_a_lost_device_is_not_mistaken_for_a_failed_read(reader: Host) -> None:
    reader.device.is_lost = True
    reader.start(1, (0,), (0,))
    with pytest.raises(TransferError, match="illegal memory access"):
        reader.transport.poll()
    reader.transport.close()


def test_scattered_blocks_are_left_to_the_kernel(source: Host) -> None:
    reader = Host(kernel_below_bytes=BLOCK + 1)
    reader.transport.connect("peer", source.descriptor)
    reader.start(1, (1, 9, 4), (0, 1, 2))
    reader.start(2, (4, 5, 6), (6, 7, 8))
    assert len(wait_for(reader.transport, 2)) == 2
    assert [batch.by_kernel for batch in reader.device.batches] == [True, False]
    reader.transport.close()


def test_pieces_of_another_ranks_larger_blocks_are_read(source: Host) -> None:
    reader = Host(rank=1, block_bytes=(1024,))
    with pytest.raises(TransferError, match="rank 0"):
        reader.transport.connect("peer", source.descriptor)
    reader.transport.connect("peer", source.descriptor, PeerShape(0, (BLOCK,)))
    pieces = (Piece(remote=Extent(64, 256, count=3, stride=1024), local=Extent(0, 256, count=3, stride=256)),)
    reader.transport.start_read(1, "peer", 0, (7, 2), (3, 0), Deadline.after(20), pieces)
    (completion,) = wait_for(reader.transport, 1)
    assert (completion.error, completion.num_bytes) == (None, 2 * 768)
    rows = source.regions[0].blocks
    for remote, local in ((7, 3), (2, 0)):
        expected = torch.cat([rows[remote, 64 + 1024 * run :][:256] for run in range(3)])
        assert torch.equal(reader.regions[0].blocks[local, :768], expected)
        assert not reader.regions[0].blocks[local, 768:].any()
    reader.transport.close()


def test_long_reads_are_looked_at_piece_by_piece(reader: Host, source: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc, "_BLOCKS_AT_ONCE", 4)
    monkeypatch.setattr(ipc, "_FIRST_BLOCKS", 1)
    order = (5, 3, 1, 4, 0, 2, 8, 6, 7)
    reader.device.holds = False
    reader.start(1, order, tuple(range(9)))
    reader.start(2, (*range(9, 13), 16), tuple(range(9, 14)))
    found = {done.read_id: done for done in wait_for(reader.transport, 2)}
    assert [len(batch.sizes) for batch in reader.device.batches] == [1, 2, 4, 1, 1, 1], "runs are put together"
    assert (found[1].error, found[1].num_bytes) == (None, 9 * BLOCK)
    assert torch.equal(reader.regions[0].blocks[:9], source.regions[0].blocks[list(order)])
    assert "the peer's block ids reach outside" in str(found[2].error)
    assert not reader.regions[0].blocks[13].any()


def process_descriptors() -> int:
    """Of this process's open files, those that stand for processes."""
    files = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.lexists(file) and "pidfd" in os.readlink(file) for file in files)


@pytest.mark.parametrize("has_descriptors", [True, False])
def test_a_process_that_only_waits_to_be_reaped_is_gone(monkeypatch: pytest.MonkeyPatch, has_descriptors: bool) -> None:
    def absent(pid: int) -> int:
        raise OSError("Function not implemented")

    if not has_descriptors:
        monkeypatch.setattr(os, "pidfd_open", absent)
    num_open = process_descriptors()
    with exporter_elsewhere("ipc/stand-in", block_bytes=(BLOCK,)) as exporter:
        marks = [SeenMark(decode(exporter.descriptor, handle_bytes=HANDLE_BYTES).mark, exporter.descriptor)]
        assert marks[0].defect() is None
        assert process_descriptors() == num_open + has_descriptors
        exporter.signal(signal.SIGKILL)
        wait_until(lambda: "gone" in str(marks[0].defect()))
        marks.clear()
        assert process_descriptors() == num_open


def test_memory_that_is_not_one_allocation_is_refused() -> None:
    class Pieced(HostDevice):
        def share(self, address: int) -> SharedAllocation:
            found = super().share(address)
            return SharedAllocation(found.handle, found.address, found.num_bytes - 1)

    transport = IpcTransport(rank=0, open_device=lambda _: Pieced())
    memory = allocate_shared(16 * BLOCK).view(16, BLOCK)
    with pytest.raises(TransferError, match="region only is not in one allocation"):
        transport.export((KvRegion("only", memory),))
    transport.close()


def test_memory_of_cpus_is_refused() -> None:
    with pytest.raises(TransferError, match="memory of GPUs; this is on cpu"):
        open_gpu(torch.device("cpu"))


# --- on GPUs --------------------------------------------------------------------------------------------------------


@contextmanager
def gpu_rank(kernel_below_bytes: int, num_blocks: int, block_bytes: tuple[int, ...]) -> Iterator[Rank]:
    regions = make_regions(num_blocks=num_blocks, block_bytes=block_bytes, seed=None, name="ipc/cuda")
    transport = IpcTransport(rank=0, kernel_below_bytes=kernel_below_bytes)
    try:
        yield Rank(transport, regions, transport.export(regions))
    finally:
        transport.close()


def check_both_ways_of_copying(source: int) -> None:
    """Scattered blocks of a process on this GPU arrive on the first one, by copy engines and by the kernel."""
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist()
    sizes = (64, 200, 65536)
    with exporter_elsewhere("ipc/cuda", num_blocks=200, block_bytes=sizes, device_index=source) as exporter:
        for kernel_below_bytes in (0, 1 << 60):
            with gpu_rank(kernel_below_bytes, 200, sizes) as reader:
                reader.transport.connect("peer", exporter.descriptor)
                for group in range(3):
                    assert reader.read(group, "peer", tuple(range(200)), tuple(order), group).error is None
                    found = reader.regions[group].blocks[order]
                    assert torch.equal(found, exporter.regions[group].blocks), (kernel_below_bytes, group)


@pytest.mark.gpu
@needs_device
def test_copy_engines_and_kernel_copy_the_same() -> None:
    check_both_ways_of_copying(source=0)


@pytest.mark.gpu
@needs_device
def test_reads_are_right_while_the_device_computes() -> None:
    busy = torch.randn(4096, 4096, device="cuda")
    with exporter_elsewhere("ipc/cuda") as exporter, rank_here("ipc/cuda") as reader:
        reader.transport.connect("peer", exporter.descriptor)
        for read_id in range(50):
            for _ in range(4):
                busy = busy @ busy * 1e-3
            block = read_id % 16
            reader.transport.start_read(read_id, "peer", 2, (block,), (15 - block,), Deadline.after(20))
        assert {done.error for done in wait_for(reader.transport, 50)} == {None}
        assert torch.equal(reader.regions[2].blocks.flip(0), exporter.regions[2].blocks)


@pytest.mark.gpu
@needs_device
def test_memory_of_expandable_segments_is_refused_by_name(repo_root: Path) -> None:
    code = (
        "from tests.kv_transfer.ranks import *\n"
        "from atom_cluster.errors import TransferError\n"
        "try:\n    rank_here('ipc/cuda', block_bytes=(1 << 22,)).__enter__()\n"
        "except TransferError as error:\n    print(error)\n"
    )
    setting = "expandable_segments:True"
    env = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repo_root, env=env, capture_output=True, text=True, check=True)
    assert "expandable_segments" in done.stdout


@pytest.mark.gpu
@pytest.mark.multi_gpu
@needs_devices
def test_a_gpu_that_the_reader_cannot_see_is_read_from(repo_root: Path) -> None:
    """As under Ray, which gives each process one GPU. The exporter is the reader's child and sees another one."""
    code = (
        "import os\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = os.environ['HIP_VISIBLE_DEVICES'] = '1'\n"
        "from tests.kv_transfer.ranks import *\n"
        "with rank_here('ipc/cuda', seed=7) as rank:\n"
        "    print(rank.descriptor.hex(), flush=True)\n"
        "    input()\n"
    )
    reading = (
        "import os, sys\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = os.environ['HIP_VISIBLE_DEVICES'] = '0'\n"
        "from tests.kv_transfer.ranks import *\n"
        "assert torch.cuda.device_count() == 1\n"
        "truth = make_regions(num_blocks=16, block_bytes=SMALL, seed=7, name='ipc/cuda')\n"
        "with rank_here('ipc/cuda') as reader:\n"
        "    reader.transport.connect('peer', bytes.fromhex(input()))\n"
        "    for group in range(3):\n"
        "        blocks = tuple(range(16))\n"
        "        done = reader.read(group, 'peer', blocks, blocks, group)\n"
        "        assert done.error is None, done\n"
        "        assert torch.equal(reader.regions[group].blocks, truth[group].blocks)\n"
        "print('read')\n"
    )
    command = [sys.executable, "-c"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": repo_root}
    with subprocess.Popen([*command, code], **pipes) as exporter:  # type: ignore[call-overload]
        try:
            descriptor = exporter.stdout.readline()
            done = subprocess.run(
                [*command, reading], cwd=repo_root, input=descriptor, capture_output=True, text=True, check=False
            )
            assert done.stdout == "read\n", done.stderr
        finally:
            exporter.kill()


@pytest.mark.gpu
@pytest.mark.multi_gpu
@needs_devices
def test_blocks_of_another_gpu_arrive_both_ways() -> None:
    check_both_ways_of_copying(source=1)
