"""Bytes per second that KV transports move between two processes of this host, next to a plain copy of as many bytes.

    python -m benchmarks.kv_transfer --device cpu --transports shm tcp
    python -m benchmarks.kv_transfer --device cuda --transports ipc ipc-engines ipc-kernel tcp

The exporter is on the last GPU and the reader on the first: the same one where there is one. Memory is made up, one
region per size of blocks; the transports are those that engines use, polled as often as an agent does. Every read is of
the whole region: its blocks in order, or in random order on both sides, which leaves nothing to merge. What arrived is
compared after each. The plain copy is one call from a tensor to another, between the same two devices.

`ipc-engines` and `ipc-kernel` are `ipc` made to copy one way only, whatever the blocks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import torch

from atom_cluster.errors import AtomClusterError
from atom_cluster.kv_transfer import registry
from atom_cluster.kv_transfer.protocol import KvRegion, KvTransport
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.kv_transfer.shared_memory import allocate_shared
from atom_cluster.units import Deadline, GiB, KiB, MiB
from benchmarks.records import save_record

IPC_VARIANTS = {"ipc-engines": 0, "ipc-kernel": 1 << 60}
"""Bytes under which runs of blocks are left to the kernel."""
POLL_S = 0.0005
"""Between two polls, as in an agent."""
TIMEOUT_S = 120.0
SECRET = b"both ends are this benchmark"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Reads of one kind."""

    transport: str
    block_bytes: int
    order: str
    """`in order` or `scattered`."""
    num_blocks: int
    seconds: float
    """Median of the reads, from the order until the poll that says it is over."""
    best_seconds: float
    one_block_seconds: float
    """Median of reads of a single block."""
    gib_per_s: float
    share_of_plain: float
    """Of the rate of a plain copy of as many bytes, measured in the same process right before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is read."""

    block_bytes: tuple[int, ...]
    region_bytes: int
    repeats: int


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and save it if asked to."""
    args = parse_arguments(arguments)
    sizes = Sizes(
        block_bytes=tuple(kib * KiB for kib in args.block_kib), region_bytes=args.mib * MiB, repeats=args.repeats
    )
    rates: list[Rate] = []
    failures: dict[str, str] = {}
    print(f"{'transport':12}{'block KiB':>10} {'order':10}{'GiB/s':>8}{'best':>8}{'of plain':>9}{'one block us':>13}")
    for name in args.transports or default_transports(args.device):
        failure = measure_into(rates, name, args.device, sizes)
        if failure is not None:
            failures[name] = failure
            print(f"{name:12} cannot: {failure}", flush=True)
    if args.save:
        details = {"poll_s": POLL_S, "rates": [asdict(rate) for rate in rates], "failures": failures}
        print(f"saved {save_record('kv_transfer', args.label or args.device, details, arguments=arguments)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the KV memory of both ends is")
    parser.add_argument("--transports", nargs="+", metavar="NAME", help="default: all that are there for the device")
    parser.add_argument("--block-kib", nargs="+", type=int, default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--mib", type=int, default=512, help="of each region, and so of each read")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--label", default="", help="in the file's name; default: the device")
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    return parser.parse_args(arguments)


def default_transports(device: str) -> tuple[str, ...]:
    """Names of all that may work."""
    names = registry.available(device)
    return (*names, *IPC_VARIANTS) if "ipc" in names else names


def measure_into(rates: list[Rate], name: str, device: str, sizes: Sizes) -> str | None:
    """Measure a transport and print what comes out; why it does not work here, if so."""
    try:
        for rate in measure(name, device, sizes):
            rates.append(rate)
            print_rate(rate)
    except AtomClusterError as exc:
        return str(exc)
    return None


def measure(name: str, device: str, sizes: Sizes) -> Iterator[Rate]:
    """All reads through one transport. Raises `AtomClusterError` when it does not work here."""
    with exporter(name, device, sizes) as descriptor:
        transport, regions, _ = open_exported(name, make_regions(device, 0, sizes))
        try:
            transport.connect("peer", descriptor)
            for group, region in enumerate(regions):
                yield from measure_region(name, transport, region, group, sizes)
        finally:
            transport.close()


def measure_region(name: str, transport: KvTransport, region: KvRegion, group: int, sizes: Sizes) -> Iterator[Rate]:
    """Reads of one size of blocks."""
    num_blocks, block_bytes = region.blocks.shape
    plain_s = seconds_of_plain_copy(region.blocks, sizes.repeats)
    one_block_s = [
        seconds_of_read(transport, group, (index % num_blocks,), (index % num_blocks,)) for index in range(20)
    ]
    for order in ("in order", "scattered"):
        remote, local = list(range(num_blocks)), list(range(num_blocks))
        if order == "scattered":
            random.Random(1).shuffle(remote)
            random.Random(2).shuffle(local)
        region.blocks.zero_()
        synchronize(region.blocks.device)
        seconds = [seconds_of_read(transport, group, remote, local) for _ in range(sizes.repeats)]
        expected = contents(group, num_blocks)[remote].to(region.blocks.device)
        if not bool((region.blocks[local] == expected[:, None]).all()):
            raise SystemExit(f"{name} brought wrong bytes: blocks of {block_bytes} bytes, {order}")
        median_s = statistics.median(seconds)
        yield Rate(
            transport=name,
            block_bytes=block_bytes,
            order=order,
            num_blocks=num_blocks,
            seconds=median_s,
            best_seconds=min(seconds),
            one_block_seconds=statistics.median(one_block_s),
            gib_per_s=region.blocks.nbytes / median_s / GiB,
            share_of_plain=plain_s / median_s,
        )


def seconds_of_read(transport: KvTransport, group: int, remote: Sequence[int], local: Sequence[int]) -> float:
    """One read, waited for as an agent does. Ends the benchmark if it fails."""
    begin = time.perf_counter()
    transport.start_read(1, "peer", group, tuple(remote), tuple(local), Deadline.after(TIMEOUT_S))
    while not (completions := transport.poll()):
        time.sleep(POLL_S)
    seconds = time.perf_counter() - begin
    if completions[0].error is not None:
        raise SystemExit(f"a read failed: {completions[0].error}")
    return seconds


def seconds_of_plain_copy(target: torch.Tensor, repeats: int) -> float:
    """Median of copies of as many bytes from the exporter's device, in one call."""
    last = torch.cuda.device_count() - 1
    source = torch.ones_like(target, device=torch.device("cuda", last) if target.is_cuda else target.device)
    seconds = []
    for _ in range(repeats + 1):
        synchronize(target.device)
        begin = time.perf_counter()
        target.copy_(source)
        synchronize(target.device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


@contextmanager
def exporter(name: str, device: str, sizes: Sizes) -> Iterator[bytes]:
    """The descriptor of a rank in another process, whose blocks have known contents."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=export, args=(theirs, name, device, sizes), daemon=True)
    process.start()
    theirs.close()
    try:
        descriptor, error = ours.recv()
        if error:
            raise AtomClusterError(error)
        yield descriptor
    finally:
        process.kill()
        process.join()
        ours.close()


def export(connection: Connection, name: str, device: str, sizes: Sizes) -> None:
    """In the other process, until it is killed."""
    index = torch.cuda.device_count() - 1 if device == "cuda" else 0
    try:
        transport, regions, descriptor = open_exported(name, make_regions(device, index, sizes))
    except AtomClusterError as exc:
        connection.send((b"", str(exc)))
        return
    for group, region in enumerate(regions):
        region.blocks.copy_(contents(group, region.blocks.shape[0]).to(region.blocks.device)[:, None])
    synchronize(regions[0].blocks.device)
    connection.send((descriptor, ""))
    while not connection.poll(0.1):
        transport.poll()


def open_exported(name: str, regions: tuple[KvRegion, ...]) -> tuple[KvTransport, tuple[KvRegion, ...], bytes]:
    """A transport with these regions."""
    settings = TransportSettings(rank=0, host="127.0.0.1", secret=SECRET)
    if name in IPC_VARIANTS:
        from atom_cluster.kv_transfer.ipc import IpcTransport

        transport: KvTransport = IpcTransport(rank=0, kernel_below_bytes=IPC_VARIANTS[name])
    else:
        transport = registry.open_transport(name, settings)
    try:
        return transport, regions, transport.export(regions)
    except AtomClusterError:
        transport.close()
        raise


def make_regions(device: str, index: int, sizes: Sizes) -> tuple[KvRegion, ...]:
    """One per size of blocks, touched so that the system has given its pages."""
    regions = []
    for block_bytes in sizes.block_bytes:
        num_blocks = max(1, sizes.region_bytes // block_bytes)
        if device == "cpu":
            memory = allocate_shared(num_blocks * block_bytes)
        else:
            memory = torch.empty(num_blocks * block_bytes, dtype=torch.uint8, device=torch.device("cuda", index))
        regions.append(KvRegion(f"{block_bytes} bytes", memory.view(num_blocks, block_bytes).zero_()))
    return tuple(regions)


def contents(group: int, num_blocks: int) -> torch.Tensor:
    """What every byte of block i is: uint8 [num_blocks], never zero."""
    return ((torch.arange(num_blocks) * 37 + group) % 251 + 1).to(torch.uint8)


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_rate(rate: Rate) -> None:
    """One row of the table."""
    best = rate.gib_per_s * rate.seconds / rate.best_seconds
    print(
        f"{rate.transport:12}{rate.block_bytes / KiB:10.0f} {rate.order:10}{rate.gib_per_s:8.2f}{best:8.2f}"
        f"{rate.share_of_plain:9.0%}{rate.one_block_seconds * 1e6:13.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
