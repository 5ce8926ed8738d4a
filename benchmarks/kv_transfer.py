"""Bytes per second that KV transports move between two processes of this host, next to a plain copy of as many bytes.

    python -m benchmarks.kv_transfer --device cpu --transports shm tcp
    python -m benchmarks.kv_transfer --device cuda --transports ipc ipc-engines ipc-kernel tcp
    python -m benchmarks.kv_transfer --device cuda --tags

The exporter is on the last GPU and the reader on the first: the same one where there is one. Memory is made up; the
transports are those that engines use, asked as an agent asks them. A read is of all blocks of a region, in order, or in
random order on both sides, which leaves nothing to merge; or of what a chunk of 2048 tokens of a model is, out of a
larger region. What arrived is compared after each. The plain copy is one call from a tensor to another, between the
same two devices.

Short reads depend on how fast the host's processor is, which on a shared one changes from second to second: beside each
rate stands what a loop of 20,000 turns of Python took right before.

`ipc-engines` and `ipc-kernel` are `ipc` made to copy one way only, whatever the blocks. `--tags` measures nothing but
the tags of a prompt's blocks, which are computed once on either side.
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
from atom_cluster.kv_transfer.checksum import BlockTagger
from atom_cluster.kv_transfer.pace import PollPace
from atom_cluster.kv_transfer.protocol import KvRegion, KvTransport
from atom_cluster.kv_transfer.registry import TransportSettings
from atom_cluster.kv_transfer.shared_memory import allocate_shared
from atom_cluster.platform.timers import wake_on_time
from atom_cluster.units import Deadline, GiB, KiB, MiB
from benchmarks.records import save_record

IPC_VARIANTS = {"ipc-engines": 0, "ipc-kernel": 1 << 60}
"""Bytes under which runs of blocks are left to the kernel."""
BLOCK_TOKENS = 16
CHUNK_TOKENS = 2048
TOKEN_BYTES = {"llama_8b": 128 * KiB, "llama_70b, 1 of 8 ranks": 40 * KiB, "deepseek_r1": 61 * 576 * 2}
"""Of KV in bfloat16. A block has all layers of its tokens, one after the other."""
TAGGED_TOKENS = (1024, 8192, 32768)
TIMEOUT_S = 120.0
_WAKE_S = 2.0
SECRET = b"both ends are this benchmark"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Reads of one kind."""

    transport: str
    what: str
    block_bytes: int
    order: str
    """`in order` or `scattered`."""
    num_blocks: int
    seconds: float
    """Median of the reads, from the order until the poll that says it is over."""
    best_seconds: float
    one_block_seconds: float
    """Median of reads of a single block."""
    loop_seconds: float
    """Of 20,000 turns of Python, which tell how fast the processor was."""
    gib_per_s: float
    share_of_plain: float
    """Of the rate of a plain copy of as many bytes, measured in the same process right before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is read."""

    what: str
    block_bytes: int
    num_blocks: int
    """Of the region."""
    num_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TagTime:
    """Of all blocks of a prompt."""

    what: str
    num_tokens: int
    num_bytes: int
    seconds: float


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and save it if asked to."""
    args = parse_arguments(arguments)
    if args.tags:
        times = measure_tags(args.device, args.repeats)
        details: dict[str, object] = {"tags": [asdict(time) for time in times]}
    else:
        cases = cases_of(args.block_kib, args.mib * MiB)
        rates: list[Rate] = []
        failures: dict[str, str] = {}
        columns = f"{'GiB/s':>8}{'best':>8}{'of plain':>9}{'one block us':>13}{'loop us':>8}"
        print(f"{'transport':12}{'blocks':>32} {'order':10}{columns}")
        for name in args.transports or default_transports(args.device):
            failure = measure_into(rates, name, args.device, cases, args.repeats)
            if failure is not None:
                failures[name] = failure
                print(f"{name:12} cannot: {failure}", flush=True)
        details = {"rates": [asdict(rate) for rate in rates], "failures": failures}
    if args.save:
        print(f"saved {save_record('kv_transfer', args.label or args.device, details, arguments=arguments)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the KV memory of both ends is")
    parser.add_argument("--transports", nargs="+", metavar="NAME", help="default: all that are there for the device")
    parser.add_argument("--block-kib", nargs="+", type=int, default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--mib", type=int, default=512, help="of each read of a whole region")
    parser.add_argument("--tags", action="store_true", help="measure tags instead")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--label", default="", help="in the file's name; default: the device")
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    return parser.parse_args(arguments)


def default_transports(device: str) -> tuple[str, ...]:
    """Names of all that may work."""
    names = registry.available(device)
    return (*names, *IPC_VARIANTS) if "ipc" in names else names


def cases_of(block_kib: Sequence[int], region_bytes: int) -> tuple[Case, ...]:
    """Reads of whole regions with blocks of these sizes, and of the models' chunks."""
    cases = []
    for kib in block_kib:
        num = max(1, region_bytes // (kib * KiB))
        cases.append(Case(what=f"{num} of {kib} KiB", block_bytes=kib * KiB, num_blocks=num, num_read=num))
    num = CHUNK_TOKENS // BLOCK_TOKENS
    for model, token_bytes in TOKEN_BYTES.items():
        cases.append(Case(what=model, block_bytes=BLOCK_TOKENS * token_bytes, num_blocks=4 * num, num_read=num))
    return tuple(cases)


def measure_into(rates: list[Rate], name: str, device: str, cases: tuple[Case, ...], repeats: int) -> str | None:
    """Measure a transport and print what comes out; why it does not work here, if so."""
    try:
        for rate in measure(name, device, cases, repeats):
            rates.append(rate)
            print_rate(rate)
    except AtomClusterError as exc:
        return str(exc)
    return None


def measure(name: str, device: str, cases: tuple[Case, ...], repeats: int) -> Iterator[Rate]:
    """All reads through one transport. Raises `AtomClusterError` when it does not work here."""
    with exporter(name, device, cases) as descriptor:
        transport, regions, _ = open_exported(name, make_regions(device, 0, cases))
        try:
            transport.connect("peer", descriptor)
            wake(transport, cases[0])
            for group, (region, case) in enumerate(zip(regions, cases, strict=True)):
                yield from measure_case(name, transport, region, group, case, repeats)
        finally:
            transport.close()


def wake(transport: KvTransport, case: Case) -> None:
    """Read for a while: clocks rise and links leave their sleep in the first second, which is nobody's rate."""
    deadline = Deadline.after(_WAKE_S)
    blocks = tuple(range(case.num_blocks))
    while not deadline.has_passed:
        seconds_of_read(transport, 0, blocks, blocks)


def measure_case(
    name: str, transport: KvTransport, region: KvRegion, group: int, case: Case, repeats: int
) -> Iterator[Rate]:
    """Reads of one kind, in both orders."""
    num_bytes = case.num_read * case.block_bytes
    plain_s = seconds_of_plain_copy(region.blocks[: case.num_read], repeats)
    one_block_s = [
        seconds_of_read(transport, group, (index % case.num_blocks,), (index % case.num_blocks,)) for index in range(20)
    ]
    for order in ("in order", "scattered"):
        remote, local = list(range(case.num_blocks)), list(range(case.num_blocks))
        if order == "scattered":
            random.Random(1).shuffle(remote)
            random.Random(2).shuffle(local)
        remote, local = remote[: case.num_read], local[: case.num_read]
        region.blocks.zero_()
        synchronize(region.blocks.device)
        loop_s = seconds_of_loop()
        seconds = [seconds_of_read(transport, group, tuple(remote), tuple(local)) for _ in range(repeats)]
        expected = contents(group, case.num_blocks)[remote].to(region.blocks.device)
        if not bool((region.blocks[local] == expected[:, None]).all()):
            raise SystemExit(f"{name} brought wrong bytes: {case.what}, {order}")
        median_s = statistics.median(seconds)
        yield Rate(
            transport=name,
            what=case.what,
            block_bytes=case.block_bytes,
            order=order,
            num_blocks=case.num_read,
            seconds=median_s,
            best_seconds=min(seconds),
            one_block_seconds=statistics.median(one_block_s),
            loop_seconds=loop_s,
            gib_per_s=num_bytes / median_s / GiB,
            share_of_plain=plain_s / median_s,
        )


def seconds_of_read(transport: KvTransport, group: int, remote: tuple[int, ...], local: tuple[int, ...]) -> float:
    """One read, waited for as an agent does. Ends the benchmark if it fails."""
    begin = time.perf_counter()
    pace = PollPace()
    transport.start_read(1, "peer", group, remote, local, Deadline.after(TIMEOUT_S))
    while not (completions := transport.poll()):
        if pause_s := pace.pause_s:
            time.sleep(pause_s)
    seconds = time.perf_counter() - begin
    if completions[0].error is not None:
        raise SystemExit(f"a read failed: {completions[0].error}")
    return seconds


def seconds_of_loop() -> float:
    """Median of loops that do nothing."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(20_000):
            pass
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


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
def exporter(name: str, device: str, cases: tuple[Case, ...]) -> Iterator[bytes]:
    """The descriptor of a rank in another process, whose blocks have known contents."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=export, args=(theirs, name, device, cases), daemon=True)
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


def export(connection: Connection, name: str, device: str, cases: tuple[Case, ...]) -> None:
    """In the other process, until it is killed."""
    index = torch.cuda.device_count() - 1 if device == "cuda" else 0
    try:
        transport, regions, descriptor = open_exported(name, make_regions(device, index, cases))
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


def make_regions(device: str, index: int, cases: tuple[Case, ...]) -> tuple[KvRegion, ...]:
    """One per case, touched so that the system has given its pages."""
    return tuple(make_region(device, index, case) for case in cases)


def make_region(device: str, index: int, case: Case) -> KvRegion:
    """Zeros."""
    num_bytes = case.num_blocks * case.block_bytes
    if device == "cpu":
        memory = allocate_shared(num_bytes)
    else:
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=torch.device("cuda", index))
    return KvRegion(case.what, memory.view(case.num_blocks, case.block_bytes).zero_())


def measure_tags(device: str, repeats: int) -> list[TagTime]:
    """Medians for prompts of some lengths, of blocks in random order."""
    found = []
    print(f"{'blocks':>32}{'tokens':>8}{'MiB':>7}{'ms':>9}{'GiB/s':>8}")
    for model, token_bytes in TOKEN_BYTES.items():
        num_blocks = max(TAGGED_TOKENS) // BLOCK_TOKENS
        case = Case(what=model, block_bytes=BLOCK_TOKENS * token_bytes, num_blocks=num_blocks, num_read=num_blocks)
        tagger = BlockTagger((make_region(device, 0, case),))
        blocks = random.Random(1).sample(range(num_blocks), num_blocks)
        for num_tokens in TAGGED_TOKENS:
            seconds = []
            for _ in range(repeats + 1):
                begin = time.perf_counter()
                tagger.tags(0, blocks[: num_tokens // BLOCK_TOKENS], epoch=1)
                seconds.append(time.perf_counter() - begin)
            row = TagTime(
                what=model,
                num_tokens=num_tokens,
                num_bytes=num_tokens * token_bytes,
                seconds=statistics.median(seconds[1:]),
            )
            found.append(row)
            rate = row.num_bytes / row.seconds / GiB
            print(f"{model:>32}{num_tokens:8}{row.num_bytes // MiB:7}{row.seconds * 1e3:9.3f}{rate:8.0f}", flush=True)
    return found


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
        f"{rate.transport:12}{rate.what:>32} {rate.order:10}{rate.gib_per_s:8.2f}{best:8.2f}"
        f"{rate.share_of_plain:9.0%}{rate.one_block_seconds * 1e6:13.0f}{rate.loop_seconds * 1e6:8.0f}",
        flush=True,
    )


if __name__ == "__main__":
    wake_on_time()  # as agents do
    main()
