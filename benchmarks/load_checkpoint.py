"""Seconds and memory that the ranks of a gang take to load a checkpoint, next to plainly reading its files.

    python -m benchmarks.load_checkpoint --dir /tmp/checkpoint --gigabytes 20 --ranks 2

Writes a checkpoint of random bfloat16 weights (a dense Qwen3 with as many layers as it takes) unless the directory has
one, which then stays there, and loads it with the reference ops, which keep weights as they are. Files are dropped from
the page cache before each measurement, and readings of the plain files come before and after each load, so that a
changing disk shows.
A rank's peak memory is its process's high-water mark of resident memory, interpreter and libraries included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import save_file

from atom_cluster.layers.context import LayerContext
from atom_cluster.models.hf_config import HfConfig
from atom_cluster.models.registry import build_model, load_model, spec_from_config
from atom_cluster.ops.select import torch_table
from atom_cluster.parallel.groups import Group, ProcessGroups
from benchmarks.records import save_record

GB = 1e9
MARGIN_BYTES = 2 * GB
"""What a rank may take beside its shard."""
FILE_BYTES = 2 * GB
READ_BYTES = 16 << 20
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_LAYER_GB, _REST_GB = 0.386, 2.49


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """One rank's load."""

    start_s: float
    """On the machine's monotonic clock."""
    end_s: float
    shard_bytes: int
    peak_bytes: int
    bytes_before: int
    """Resident before loading: interpreter and libraries."""

    @property
    def is_within_margin(self) -> bool:
        """Whether the peak is below shard and margin."""
        return self.peak_bytes <= self.shard_bytes + MARGIN_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One load of all ranks, and the plain readings around it."""

    plain_s: tuple[float, float]
    """Reading all files, before and after."""
    load_s: float
    """Until the last rank was done; one after the other: the sum."""
    ranks: tuple[RankResult, ...]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and save it if asked to."""
    args = parse_arguments(arguments)
    is_ours = write_checkpoint(args.dir, args.gigabytes)
    num_bytes = sum(path.stat().st_size for path in weight_files(args.dir))
    rounds = []
    plain_s = read_plainly(args.dir, args.threads)
    for _ in range(args.rounds):
        load_s, ranks = load_all_ranks(args)
        plain_after_s = read_plainly(args.dir, args.threads)
        rounds.append(Round(plain_s=(plain_s, plain_after_s), load_s=load_s, ranks=ranks))
        plain_s = plain_after_s
        print_round(rounds[-1], num_bytes)
    if args.save:
        print(f"saved {save(rounds, args, num_bytes)}")
    if is_ours and not args.keep:
        shutil.rmtree(args.dir)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="of a checkpoint; made, and removed, if there is none")
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--ranks", type=int, default=2, help="of the tensor-parallel group")
    parser.add_argument("--in-turn", action="store_true", help="rank after rank, where memory cannot hold all at once")
    parser.add_argument("--device", default="cpu", help="where weights go: cpu, cuda (all ranks to the same one)")
    parser.add_argument("--threads", type=int, default=8, help="that read the plain files")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave a checkpoint that was made where it is")
    parser.add_argument("--save", action="store_true", help="write JSON to benchmarks/results")
    return parser.parse_args(arguments)


def write_checkpoint(directory: Path, gigabytes: float) -> bool:
    """A checkpoint of about that size, unless there is one; whether it was written. Raises ValueError for a directory
    with anything else in it, which would be removed with it."""
    if weight_files(directory):
        return False
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"--dir {directory} is neither empty nor a checkpoint")
    directory.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "num_hidden_layers": max(1, round((gigabytes - _REST_GB) / _LAYER_GB))}
    (directory / "config.json").write_text(json.dumps(config))
    for index, shapes in enumerate(files_of(tensor_shapes(config))):
        print(f"writing file {index}", flush=True)
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in shapes.items()}
        save_file(tensors, directory / f"model-{index:05d}.safetensors")
    return True


def tensor_shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """All tensors of a model, from its own map."""
    spec = spec_from_config(HfConfig(config))
    model = build_model(spec, context_of(rank=0, num_ranks=1, device="meta"), max_model_len=16)
    return {name: part.full_shape for name, part in model.checkpoint_map().each_part()}


def files_of(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensors in files of about `FILE_BYTES`."""
    part: dict[str, tuple[int, ...]] = {}
    num_bytes = 0
    for name, shape in shapes.items():
        part[name] = shape
        num_bytes += 2 * torch.Size(shape).numel()
        if num_bytes >= FILE_BYTES:
            yield part
            part, num_bytes = {}, 0
    if part:
        yield part


def context_of(*, rank: int, num_ranks: int, device: str = "cpu") -> LayerContext:
    """Ranks exchange nothing while they load, so they need not meet."""
    groups = ProcessGroups(Group(rank=rank, size=num_ranks, handle=None))
    table = torch_table("weights are to stay as they are")
    return LayerContext(ops=table, groups=groups, dtype=torch.bfloat16, device=torch.device(device))


def weight_files(directory: Path) -> list[Path]:
    """In the order of their names."""
    return sorted(directory.glob("*.safetensors"))


def forget_files(directory: Path) -> None:
    """Drop them from the page cache."""
    for path in weight_files(directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # what is not on disk yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(directory: Path, num_threads: int) -> float:
    """Seconds to read all files, each cut into ranges that threads take in turn, into the same few buffers."""
    forget_files(directory)
    ranges = [
        (path, offset) for path in weight_files(directory) for offset in range(0, path.stat().st_size, READ_BYTES)
    ]
    descriptors = {path: os.open(path, os.O_RDONLY) for path in weight_files(directory)}
    rest = iter(ranges)

    def read() -> None:
        buffer = bytearray(READ_BYTES)
        for path, offset in rest:
            os.preadv(descriptors[path], [buffer], offset)

    start = time.monotonic()
    with ThreadPoolExecutor(num_threads) as pool:
        for future in [pool.submit(read) for _ in range(num_threads)]:
            future.result()
    elapsed_s = time.monotonic() - start
    for descriptor in descriptors.values():
        os.close(descriptor)
    return elapsed_s


def load_all_ranks(args: argparse.Namespace) -> tuple[float, tuple[RankResult, ...]]:
    """Seconds, and each rank's figures. Processes are started beforehand."""
    if args.in_turn:
        results = []
        for rank in range(args.ranks):
            forget_files(args.dir)
            results += start_ranks(args, [rank])
        return sum(result.end_s - result.start_s for result in results), tuple(results)
    forget_files(args.dir)
    together = start_ranks(args, list(range(args.ranks)))
    return max(rank.end_s for rank in together) - min(rank.start_s for rank in together), tuple(together)


def start_ranks(args: argparse.Namespace, ranks: list[int]) -> list[RankResult]:
    """Load these ranks' shards at once, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in ranks:
        ours, theirs = context.Pipe()
        process = context.Process(target=load_rank, args=(args.dir, rank, args.ranks, args.device, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send("go")
    results: list[RankResult] = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return results


def load_rank(directory: Path, rank: int, num_ranks: int, device: str, pipe: Connection) -> None:
    """One rank's process."""
    torch.zeros(1, device=device)  # start the device's library
    pipe.send("ready")
    pipe.recv()
    bytes_before = memory_bytes("VmRSS")
    start_s = time.monotonic()
    model = load_model(directory, context=context_of(rank=rank, num_ranks=num_ranks, device=device), max_model_len=16)
    end_s = time.monotonic()
    shape_context = context_of(rank=rank, num_ranks=num_ranks, device="meta")
    map_of_shard = build_model(model.spec, shape_context, max_model_len=16).checkpoint_map()
    pipe.send(
        RankResult(
            start_s=start_s,
            end_s=end_s,
            shard_bytes=sum(part.target.nbytes for _, part in map_of_shard.each_part()),
            peak_bytes=memory_bytes("VmHWM"),
            bytes_before=bytes_before,
        )
    )


def memory_bytes(field: str) -> int:
    """Of this process, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"the kernel does not tell {field}")


def print_round(result: Round, num_bytes: int) -> None:
    """A line for the load and one per rank."""
    plain_s = statistics.fmean(result.plain_s)
    print(
        f"plain files {num_bytes / plain_s / GB:.2f} GB/s ({plain_s:.1f} s)   "
        f"load {num_bytes / result.load_s / GB:.2f} GB/s ({result.load_s:.1f} s)   ratio {plain_s / result.load_s:.2f}"
    )
    for index, rank in enumerate(result.ranks):
        print(
            f"  rank {index}: {rank.end_s - rank.start_s:.1f} s, shard {rank.shard_bytes / GB:.2f} GB, peak "
            f"{rank.peak_bytes / GB:.2f} GB, {rank.bytes_before / GB:.2f} GB of it before loading: "
            f"{'within' if rank.is_within_margin else 'ABOVE'} the margin",
            flush=True,
        )


def save(rounds: list[Round], args: argparse.Namespace, num_bytes: int) -> Path:
    """Write the rounds and everything needed to repeat them."""
    details = {
        "checkpoint_bytes": num_bytes,
        "ranks": args.ranks,
        "at_once": not args.in_turn,
        "device": args.device,
        "rounds": [asdict(each) for each in rounds],
        "ratio_to_plain_reading": statistics.median(statistics.fmean(each.plain_s) / each.load_s for each in rounds),
    }
    return save_record("load_checkpoint", "", details)


if __name__ == "__main__":
    main()
